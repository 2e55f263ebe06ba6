"""PyTorch: `weight`, `bias`, `running_mean`, `running_var` and `num_batches_tracked`."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert import _entries
from jaxbn.convert._entries import Array, Params, State

_NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "count",
}
_AFFINE = ("weight", "bias")
_RUNNING = ("running_mean", "running_var")


def from_torch(state_dict: Mapping[str, Any], prefix: str = "") -> tuple[Params, State | None]:
    """Our params and state, from a batch norm of PyTorch's.

    `weight` becomes `scale`, `bias` stays, `running_mean` and `running_var` become `mean` and
    `var`, and `num_batches_tracked` becomes `count`. The convention is `jaxbn.PYTORCH`, with
    features on axis 1; a layer's `momentum` is one minus ours, and its `eps` our `epsilon`.

    Args:
      state_dict: what `layer.state_dict()` returns, or a file's; tensors on any device, NumPy or
        JAX arrays. The first four have shape (C,) and a floating dtype, the last is a scalar.
      prefix: the layer's name in a model, "layer1.0.bn1", with or without a dot at its end. Other
        layers' entries are not looked at. Without it, every entry must belong to the layer.

    Returns:
      `params`, with `scale` and `bias` of shape (C,), or {} of a layer with `affine=False`, and
      `state`, with `mean` and `var` of shape (C,) and `count` (int32, scalar; not where an old
      checkpoint lacks it), or None of a layer with `track_running_stats=False`.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating (all are listed), or none
        has the prefix.
      TypeError: `state_dict` is not a mapping, or has keys that are not strings.

    Example:
      >>> import numpy as np
      >>> from jaxbn.convert import from_torch
      >>> ones = np.ones(16, np.float32)
      >>> model = {"bn.weight": ones, "bn.bias": ones, "bn.running_mean": ones,
      ...          "bn.running_var": ones, "bn.num_batches_tracked": np.int64(7), "fc.bias": ones}
      >>> params, state = from_torch(model, prefix="bn")
      >>> sorted(params), sorted(state), int(state["count"])
      (['bias', 'scale'], ['count', 'mean', 'var'], 7)

    Source: `torch.nn.BatchNorm2d`.
    """
    _entries.mapping("state_dict", state_dict)
    _entries.names("state_dict", state_dict)
    prefix = _entries.under(prefix, ".")
    leaves, problems = _read(state_dict, prefix)
    if state_dict and not any(key.startswith(prefix) for key in state_dict):
        problems = [f"no entry of the {len(state_dict)} begins with {prefix!r}"]
    _entries.refuse("state_dict does not hold one batch norm", problems)
    return _entries.split(leaves)


def to_torch(
    params: Mapping[str, Any], state: Mapping[str, Any] | None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """What a batch norm of PyTorch's loads, from our params and state.

    The inverse of `from_torch`. `layer.load_state_dict(to_torch(params, state))` takes the result
    as it is: these are NumPy arrays that PyTorch's functions take for tensors. Where a tensor
    itself is wanted, as by `load_state_dict(..., assign=True)`, `torch.from_numpy` makes it (but
    of bfloat16, which NumPy's and PyTorch's arrays do not share). To write a file, save the
    `state_dict()` of the model that has loaded them, or use `safetensors.numpy`.

    Args:
      params: `scale` and `bias`, or neither; shape (C,), or one that broadcasts, (1, C, 1, 1).
      state: `mean`, `var` and, optionally, `count`, or None.
      prefix: the layer's name in a model; `model.state_dict() | to_torch(..., prefix="bn1")` is the
        model's with this layer replaced.

    Returns:
      `weight` and `bias`, where the layer has them, and `running_mean`, `running_var` and
      `num_batches_tracked` (int64, scalar, 0 where there is no `count`), where there is a state.
      They have shape (C,), and share no memory with ours.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating; all are listed. PyTorch's
        layer has a weight and a bias, or neither.
      TypeError: `params` or `state` is no mapping.

    Example:
      >>> import jaxbn
      >>> from jaxbn.convert import to_torch
      >>> params, state = jaxbn.init((64, 16, 32, 32), axis=1)
      >>> list(to_torch(params, state, prefix="bn"))
      ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    """
    leaves, problems = _entries.join(params, state)
    leaves = _entries.flat(leaves)
    lacking = [_entries.label(k) for k in _entries.PARAMS if k not in params]
    if len(lacking) == 1:
        problems.append(f"missing {lacking[0]}: PyTorch has a weight and a bias, or neither")
    problems += _entries.our_problems(leaves)
    _entries.refuse("PyTorch's batch norm cannot hold these params and state", problems)
    if state is not None:
        leaves["count"] = np.asarray(leaves.get("count", 0), np.int64)
    prefix = _entries.under(prefix, ".")
    return {
        prefix + theirs: np.array(leaves[ours]).view(_TensorLike)
        for theirs, ours in _NAMES.items()
        if ours in leaves
    }


def batch_norms_from_torch(
    state_dict: Mapping[str, Any],
) -> dict[str, tuple[Params, State | None]]:
    """Our params and state of every batch norm in a model of PyTorch's.

    A batch norm is found by its running statistics, or their number of batches. One with
    `track_running_stats=False` has none, and its entries look like those of any other
    normalization: it is left out, and `from_torch` converts it by its name. An instance norm with
    `track_running_stats=True` looks like a batch norm, and is among the results.

    Args:
      state_dict: what `model.state_dict()` returns, or a file's; see `from_torch`.

    Returns:
      What `from_torch` returns for each, by the layer's name ("layer1.0.bn1"; "" where the model
      is one batch norm), in the order of `state_dict`.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating; all are listed.
      TypeError: `state_dict` is not a mapping, or has keys that are not strings.

    Example:
      >>> import numpy as np
      >>> from jaxbn.convert import batch_norms_from_torch
      >>> zeros = np.zeros(16, np.float32)
      >>> model = {"conv.weight": np.zeros((16, 3, 3, 3), np.float32),
      ...          "bn.running_mean": zeros, "bn.running_var": zeros}
      >>> {name: params for name, (params, state) in batch_norms_from_torch(model).items()}
      {'bn': {}}
    """
    _entries.mapping("state_dict", state_dict)
    _entries.names("state_dict", state_dict)
    names = {}
    for key in state_dict:
        layer, _, entry = key.rpartition(".")
        if entry in (*_RUNNING, "num_batches_tracked"):
            names[layer] = None
    found, problems = {}, []
    for name in names:
        found[name], its_problems = _read(state_dict, _entries.under(name, "."))
        problems += its_problems
    _entries.refuse("state_dict holds batch norms that are not whole", problems)
    return {name: _entries.split(leaves) for name, leaves in found.items()}


class _TensorLike(np.ndarray):
    """A NumPy array that PyTorch's functions take for a tensor, by the protocol they have for it.

    `load_state_dict` refuses other arrays; and tensors could not be made without PyTorch.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        torch = sys.modules["torch"]  # It is the caller.

        def tensor(value: Any) -> Any:
            if not isinstance(value, _TensorLike):
                return value
            plain = value.view(np.ndarray)
            if plain.dtype == jnp.bfloat16:
                return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(plain)

        args, kwargs = jax.tree.map(tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _read(state_dict: Mapping[str, Any], prefix: str) -> tuple[dict[str, Array], list[str]]:
    """Leaves with our names, and what is wrong with the entries under the prefix."""
    own = {key.removeprefix(prefix): key for key in state_dict if key.startswith(prefix)}
    missing = []
    for group in (_AFFINE, _RUNNING):
        is_there = any(k in own for k in group)
        is_there |= group == _RUNNING and "num_batches_tracked" in own
        missing += [prefix + k for k in group if is_there and k not in own]
    extra = [own[k] for k in own if k not in _NAMES]
    problems = _entries.listed("missing", missing) + _entries.listed("extra", extra)

    by_key = {own[k]: _entries.array(state_dict[own[k]]) for k in _NAMES if k in own}
    count = prefix + "num_batches_tracked"
    problems += _entries.leaf_problems({k: v for k, v in by_key.items() if k != count})
    if count in by_key:
        problems += _entries.count_problems(count, by_key[count])
    return {_NAMES[k.removeprefix(prefix)]: v for k, v in by_key.items()}, problems
