"""Two networks, one in Flax and one in PyTorch: the first place where they part."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.parity._model_statistics import Statistics, of_flax, of_torch, pairs_and_notes
from jaxbn.parity._report import Report, Row, checked_rtol, measure
from jaxbn.parity._trace import COTANGENT_SEED

if TYPE_CHECKING:
    import flax.linen as nn
    import torch


_EVALUATION = MappingProxyType({"train": False})
_TRAINING = MappingProxyType({"train": True})
# In parentheses, as no submodule's path is.
_INPUT, _OUTPUT = "(input)", "(output)"


class Pass(NamedTuple):
    """One forward and backward pass: values and gradients per intermediate, in Flax's layout.

    `statistics` are the running mean and variance of each submodule that keeps any, under its path
    in its own framework.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    statistics: Statistics


def compare_models(
    flax_model: nn.Module | tuple[nn.Module, Mapping[str, Any]],
    torch_model: torch.nn.Module,
    names: Mapping[str, str],
    x: np.ndarray,
    *,
    evaluation: Mapping[str, Any] = _EVALUATION,
    training: Mapping[str, Any] = _TRAINING,
    channels_first: Collection[int] = (4, 5),
    rtol: float = 1e-4,
) -> Report:
    """Runs two networks on one input, and says at which intermediate they first part.

    Both run in evaluation and in training, forward, and backward from `sum(output * cotangent)`
    for a fixed random cotangent. A gradient is that with respect to the intermediate. In training,
    running statistics of the named submodules are compared after the step; the report notes which
    statistics no name leads to.

    Args:
      flax_model: a Linen module that is bound, `model.bind(variables)`, or the pair
        `(model, variables)`.
      torch_model: the network that it should agree with. It is copied, and stays as it is.
      names: for each intermediate, the path of the submodule in Flax ("ResBlock_0/BatchNorm_1") and
        its name in PyTorch ("blocks.0.bn2"), in the order in which they are computed; at
        least one. The input and the output of the whole are always compared. What lies inside
        `nn.remat`, `nn.scan` or another lifted transformation cannot be named.
      x: the input in Flax's layout, a batch of images (N, H, W, C), in the dtype of both networks.
      evaluation: what makes the Flax model evaluate: keyword arguments of its call.
      training: what makes it train. Layers that draw random numbers, as dropout does, differ.
      channels_first: how many dimensions an array has that has its channels first in PyTorch and
        last in Flax. Add 3 for one-dimensional convolutions.
      rtol: the largest error, relative to the largest magnitude of PyTorch's array, that counts as
        none. The default lets float32 round through some tens of layers.

    Returns:
      A report with a row per intermediate, in the order of the computation: evaluation forward,
      training forward, running statistics, evaluation backward and training backward. Its `parted`
      is the first that differs.

    Raises:
      ValueError: no names; a name that one of the networks does not have or does not call exactly
        once; a negative or infinite `rtol`, or NaN.
      TypeError: a Flax module without variables; an intermediate that is no single array; an `rtol`
        that is not a number.

    Example:
      >>> import flax.linen as nn, jax, numpy as np, torch
      >>> from jaxbn.parity import compare_models
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
      ...         return nn.relu(x)
      >>> x = np.random.default_rng(0).normal(1, 2, (16, 3)).astype(np.float32)
      >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
      >>> ours = Net()
      >>> variables = ours.init(jax.random.key(0), x, train=False)
      >>> report = compare_models((ours, variables), theirs, {"norm": "0"}, x)
      >>> report.parted.stage, report.parted.name
      ('running statistics', 'norm mean')
    """
    rtol = checked_rtol(rtol)
    if not names:
        raise ValueError(
            "names is empty, so no intermediate and no running statistics would be compared; give "
            "at least one pair of a path in Flax and a name in PyTorch, such as "
            "{'block/bn': 'block.bn'}."
        )
    module, variables = _unbound(flax_model)
    x = np.asarray(x)
    ours, theirs = {}, {}
    for mode, options in (("evaluation", evaluation), ("training", training)):
        ours[mode] = _run_flax(module, variables, list(names), x, options)
        theirs[mode] = _run_torch(torch_model, names, x, mode == "training", channels_first)
    rows, notes = _rows(ours, theirs, names)
    return Report(tuple(rows), rtol, notes=tuple(notes))


def _rows(
    ours: Mapping[str, Pass], theirs: Mapping[str, Pass], names: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """A row per intermediate, in the order of the computation, and what was not compared."""
    rows = []
    for mode in ours:
        a, b = ours[mode], theirs[mode]
        forward = [*names, _OUTPUT]
        rows += [measure(f"{mode} forward", k, a.values[k], b.values[k]) for k in forward]
    statistics = ours["training"].statistics, theirs["training"].statistics
    pairs, notes = pairs_and_notes(*statistics, names)
    for name, left, right in pairs:
        for which, one, other in zip(("mean", "var"), left, right, strict=True):
            rows.append(measure("running statistics", f"{name} {which}", one, other))
    for mode in ours:
        a, b = ours[mode], theirs[mode]
        backward = [name for name in (*reversed(list(names)), _INPUT) if name in b.gradients]
        rows += [measure(f"{mode} backward", k, a.gradients[k], b.gradients[k]) for k in backward]
    return rows, notes


def _cotangent(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(COTANGENT_SEED).normal(size=shape)


def _unbound(flax_model: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    if isinstance(flax_model, tuple):
        return flax_model
    if getattr(flax_model, "scope", None) is None:
        raise TypeError(
            f"flax_model must be a bound Linen module, model.bind(variables), or the pair (model, "
            f"variables); got a {type(flax_model).__name__} without variables."
        )
    return flax_model.unbind()


def _run_flax(
    module: nn.Module,
    variables: Mapping[str, Any],
    paths: Sequence[str],
    x: np.ndarray,
    options: Mapping[str, Any],
) -> Pass:
    import flax.linen as nn

    calls: Counter[str] = Counter()

    def forward(zeros: Mapping[str, jax.Array], x: jax.Array):
        """The output, and what was computed on the way, each plus a zero to differentiate by."""
        calls.clear()
        intermediates = {}

        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            path = "/".join(context.module.path)
            if context.method_name == "__call__":
                calls[path] += 1
                if path in paths:
                    _require_array("Flax", path, y, jax.Array)
                    y = y + zeros[path] if path in zeros else y
                    intermediates[path] = y
            return y

        with nn.intercept_methods(intercept):
            output, updates = module.apply(
                variables, x + zeros.get(_INPUT, 0), mutable=["batch_stats"], **options
            )
        _require_array("Flax", _OUTPUT, output, jax.Array)
        return output, (intermediates, updates)

    values = jnp.asarray(x)
    _, (shapes, _) = jax.eval_shape(forward, {}, values)
    _require_one_call("Flax", paths, calls)
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    # Token numbers have no gradient.
    if jnp.issubdtype(values.dtype, jnp.floating):
        zeros[_INPUT] = jnp.zeros_like(values)
    output, pull_back, (intermediates, updates) = jax.vjp(
        lambda zeros: forward(zeros, values), zeros, has_aux=True
    )
    (gradients,) = pull_back(jnp.asarray(_cotangent(output.shape), output.dtype))
    return Pass(
        {k: np.asarray(v) for k, v in {**intermediates, _OUTPUT: output}.items()},
        {k: np.asarray(v) for k, v in gradients.items()},
        of_flax(updates.get("batch_stats") or {}),
    )


def _run_torch(torch_model: torch.nn.Module, *arguments: Any) -> Pass:
    import torch

    # The caller may have turned gradients off, but gradients are what is compared here.
    with torch.inference_mode(False), torch.enable_grad():
        return _run_torch_with_gradients(torch_model, *arguments)


def _run_torch_with_gradients(
    torch_model: torch.nn.Module,
    names: Mapping[str, str],
    x: np.ndarray,
    train: bool,
    channels_first: Collection[int],
) -> Pass:
    import torch

    model = copy.deepcopy(torch_model).train(train)
    modules = dict(model.named_modules())
    _require_known(names, modules)
    calls: Counter[str] = Counter()
    values, zeros = {}, {}

    def to_flax(tensor: torch.Tensor) -> np.ndarray:
        array = _to_numpy(tensor)
        return np.moveaxis(array, 1, -1) if array.ndim in channels_first else array

    def hook(name: str):
        def record(module, args, output):
            _require_array("PyTorch", names[name], output, torch.Tensor)
            calls[names[name]] += 1
            # Copied: what follows may write into the output, as an in-place ReLU does.
            values[name] = output.detach().clone()
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return record

    for name, module_name in names.items():
        modules[module_name].register_forward_hook(hook(name))
    # As JAX has it: without 64 bits, float64 becomes float32.
    images = np.asarray(jnp.asarray(x))
    if images.ndim in channels_first:
        images = np.moveaxis(images, -1, 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tensor = torch.tensor(images, device=device)
    if tensor.is_floating_point():
        zeros[_INPUT] = torch.zeros_like(tensor, requires_grad=True)
        tensor = tensor + zeros[_INPUT]
    output = model(tensor)
    _require_array("PyTorch", _OUTPUT, output, torch.Tensor)
    _require_one_call("PyTorch", names.values(), calls)
    values[_OUTPUT] = output.detach()
    cotangent = _cotangent(to_flax(output).shape)
    if cotangent.ndim in channels_first:
        cotangent = np.moveaxis(cotangent, -1, 1)
    output.backward(torch.tensor(cotangent).to(output))
    # An intermediate that the output does not depend on has no gradient in PyTorch; zero in JAX.
    gradients = {k: torch.zeros_like(z) if z.grad is None else z.grad for k, z in zeros.items()}
    return Pass(
        {k: to_flax(v) for k, v in values.items()},
        {k: to_flax(v) for k, v in gradients.items()},
        of_torch(modules, _to_numpy),
    )


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def _require_array(framework: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"only single arrays can be compared; in {framework}, {name} gives a "
            f"{type(value).__name__}."
        )


def _require_known(names: Mapping[str, str], modules: Collection[str]) -> None:
    unknown = [name for name in names.values() if name not in modules]
    if unknown:
        raise ValueError(
            f"names has {unknown}, which the PyTorch model does not have; it has "
            f"{sorted(name for name in modules if name)}."
        )


def _require_one_call(framework: str, names: Collection[str], calls: Mapping[str, int]) -> None:
    wrong = {name: calls.get(name, 0) for name in names if calls.get(name, 0) != 1}
    if wrong:
        raise ValueError(
            f"each name must be called once; calls in {framework}: {wrong}. Called once are "
            f"{sorted(k for k, n in calls.items() if k and n == 1)}."
        )
