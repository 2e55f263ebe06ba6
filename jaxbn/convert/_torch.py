"""PyTorch: `weight`, `bias`, `running_mean`, `running_var` and `num_batches_tracked`."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
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


def from_torch(
    state_dict: Mapping[str, Any], prefix: str = "", *, track_count: bool = True
) -> tuple[Params, State | None]:
    """Return jaxbn's params and state of a PyTorch batch norm.

    `weight` becomes `scale`, `bias` keeps its name, `running_mean` and `running_var` become `mean`
    and `var`, and `num_batches_tracked` becomes `count`. The convention is `jaxbn.PYTORCH`, with
    features on axis 1. PyTorch's `momentum` is one minus jaxbn's, and `eps` is `epsilon`.

    Args:
      state_dict: what `layer.state_dict()` returns, or the same from a file: tensors on any device,
        NumPy or JAX arrays. `num_batches_tracked` is a scalar of an integer dtype, the others have
        shape (C,) and a floating dtype.
      prefix: the layer's name in a model, "layer1.0.bn1", with or without a dot at its end. Entries
        of other layers are ignored. Without it, every entry must belong to the layer.
      track_count: whether the state has a `count`. PyTorch's layer always has one, but only
        `momentum=None` needs it, and a Flax layer with another momentum has none.

    Returns:
      `params`, with `scale` and `bias` of shape (C,), or {} for a layer with `affine=False`; and
      `state`, with `mean` and `var` of shape (C,) and, with `track_count`, `count` (int32, scalar;
      absent if an old checkpoint lacks it), or None for a layer with `track_running_stats=False`.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating (all are listed),
        or none has the prefix.
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
    _checks.mapping("state_dict", state_dict)
    _entries.check_string_keys("state_dict", state_dict)
    track_count = _checks.python_bool("track_count", track_count)
    prefix = _entries.complete_prefix(prefix, ".")
    leaves, problems = _read(state_dict, prefix)
    if state_dict and not any(key.startswith(prefix) for key in state_dict):
        problems = [f"none of the {len(state_dict)} entries begins with {prefix!r}"]
    _entries.raise_if_any("state_dict does not hold one batch norm", problems)
    return _params_and_state(leaves, track_count)


def to_torch(
    params: Mapping[str, Any], state: Mapping[str, Any] | None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Return the state dict of a PyTorch batch norm, given jaxbn's params and state.

    This is the inverse of `from_torch`. Load the result with `layer.load_state_dict(...)`: its
    NumPy arrays are of a class that PyTorch's functions accept as tensors. Where a real tensor is
    needed, as in `load_state_dict(..., assign=True)`, make it with `torch.from_numpy` (except in
    bfloat16, which it does not support). To write a file, save the `state_dict()` of the model
    that has loaded them, or use `safetensors.numpy`.

    Args:
      params: `scale` and `bias`, or neither; shape (C,), or one that broadcasts, (1, C, 1, 1).
      state: `mean`, `var` and, optionally, `count`, or None.
      prefix: the layer's name in a model. `model.state_dict() | to_torch(..., prefix="bn1")` is the
        state dict of the model with this layer replaced.

    Returns:
      `weight` and `bias`, if there are params; `running_mean`, `running_var` and
      `num_batches_tracked` (int64, scalar, 0 if there is no `count`), if there is a state. They
      have shape (C,), and share no memory with params and state.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating; all are listed.
        PyTorch's layer has a weight and a bias, or neither.
      TypeError: `params` or `state` is not a mapping.

    Example:
      >>> import jaxbn
      >>> from jaxbn.convert import to_torch
      >>> params, state = jaxbn.init((64, 16, 32, 32), axis=1)
      >>> list(to_torch(params, state, prefix="bn"))
      ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    """
    leaves, problems = _entries.named_leaves(params, state)
    leaves = _entries.with_one_axis(leaves)
    lacking = [_entries.label(k) for k in _checks.PARAMS if k not in params]
    if len(lacking) == 1:
        problems.append(f"missing {lacking[0]}: PyTorch has a weight and a bias, or neither")
    problems += _entries.all_problems(leaves)
    _entries.raise_if_any("PyTorch's batch norm cannot hold these params and state", problems)
    if state is not None:
        leaves["count"] = np.asarray(leaves.get("count", 0), np.int64)
    prefix = _entries.complete_prefix(prefix, ".")
    return {
        prefix + theirs: np.array(leaves[ours]).view(_TensorLike)
        for theirs, ours in _NAMES.items()
        if ours in leaves
    }


def batch_norms_from_torch(
    state_dict: Mapping[str, Any], *, track_count: bool = True
) -> dict[str, tuple[Params, State | None]]:
    """Return jaxbn's params and state of every batch norm in a PyTorch model.

    Batch norms are recognized by their running statistics, or the number of batches. A batch norm
    with `track_running_stats=False` has none, and its entries look like those of any other
    normalization: it is left out, and `from_torch` converts it by its name. An instance norm with
    `track_running_stats=True` looks like a batch norm, and is among the results.

    Args:
      state_dict: what `model.state_dict()` returns, or the same from a file; see `from_torch`.
      track_count: whether each state has a `count`; see `from_torch`.

    Returns:
      What `from_torch` returns for each, by the layer's name ("layer1.0.bn1"; "" if the model is a
      single batch norm), in the order of `state_dict`.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating; all are listed.
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
    _checks.mapping("state_dict", state_dict)
    _entries.check_string_keys("state_dict", state_dict)
    track_count = _checks.python_bool("track_count", track_count)
    names = {}
    for key in state_dict:
        layer, _, entry = key.rpartition(".")
        if entry in (*_RUNNING, "num_batches_tracked"):
            names[layer] = None
    found, problems = {}, []
    for name in names:
        found[name], its_problems = _read(state_dict, _entries.complete_prefix(name, "."))
        problems += its_problems
    _entries.raise_if_any("state_dict holds invalid batch norms", problems)
    return {name: _params_and_state(leaves, track_count) for name, leaves in found.items()}


class _TensorLike(np.ndarray):
    """A NumPy array that PyTorch's functions accept as a tensor, by `__torch_function__`.

    `load_state_dict` rejects other arrays, and tensors cannot be made without importing PyTorch.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        torch = sys.modules["torch"]  # PyTorch is the caller.

        def tensor(value: Any) -> Any:
            if not isinstance(value, _TensorLike):
                return value
            plain = value.view(np.ndarray)
            if plain.dtype == jnp.bfloat16:
                return torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(plain)

        args, kwargs = jax.tree.map(tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


def _params_and_state(
    leaves: Mapping[str, Array], track_count: bool
) -> tuple[Params, State | None]:
    kept = {k: v for k, v in leaves.items() if track_count or k != "count"}
    return _entries.params_and_state(kept)


def _read(state_dict: Mapping[str, Any], prefix: str) -> tuple[dict[str, Array], list[str]]:
    """Return the leaves under the prefix by jaxbn's names, and what is wrong with them."""
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
