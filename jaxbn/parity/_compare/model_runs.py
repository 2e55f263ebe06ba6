"""Run a network in Flax or in PyTorch, and keep its intermediates and their gradients."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert._entries import array
from jaxbn.parity._compare.model_statistics import StatisticsByPath, of_flax, of_torch
from jaxbn.parity._compare.recording import COTANGENT_SEED

if TYPE_CHECKING:
    import flax.linen as nn
    import torch

# The parentheses distinguish them from the paths of submodules.
INPUT, OUTPUT = "(input)", "(output)"


class ModelRun(NamedTuple):
    """One forward and backward pass, in Flax's layout.

    Attributes:
      values: the intermediates and the output.
      gradients: the gradients with respect to the intermediates and the input.
      statistics: the running mean and variance of each submodule that keeps them, under its path in
        its own framework.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    statistics: StatisticsByPath


def cotangent_of(shape: Sequence[int]) -> np.ndarray:
    """Return the cotangent of an output in Flax's layout, the same for both networks."""
    return np.random.default_rng(COTANGENT_SEED).normal(size=shape)


def run_flax(
    module: nn.Module,
    variables: Mapping[str, Any],
    paths: Sequence[str],
    x: np.ndarray,
    options: Mapping[str, Any],
) -> ModelRun:
    """Run a Linen module with these keyword arguments, and keep the outputs at `paths`."""
    import flax.linen as nn

    calls: Counter[str] = Counter()

    def forward(zeros: Mapping[str, jax.Array], x: jax.Array):
        """Return the output and the intermediates. Each gets a zero added, to differentiate by."""
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
                variables, x + zeros.get(INPUT, 0), mutable=["batch_stats"], **options
            )
        _require_array("Flax", OUTPUT, output, jax.Array)
        return output, (intermediates, updates)

    values = jnp.asarray(x)
    _, (shapes, _) = jax.eval_shape(forward, {}, values)
    _require_one_call("Flax", paths, calls)
    zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    # Integers, such as tokens, have no gradient.
    if jnp.issubdtype(values.dtype, jnp.floating):
        zeros[INPUT] = jnp.zeros_like(values)
    output, vjp, (intermediates, updates) = jax.vjp(
        lambda zeros: forward(zeros, values), zeros, has_aux=True
    )
    (gradients,) = vjp(jnp.asarray(cotangent_of(output.shape), output.dtype))
    return ModelRun(
        {k: np.asarray(v) for k, v in {**intermediates, OUTPUT: output}.items()},
        {k: np.asarray(v) for k, v in gradients.items()},
        of_flax(updates.get("batch_stats") or {}),
    )


def run_torch(
    torch_model: torch.nn.Module,
    names: Mapping[str, str],
    x: np.ndarray,
    train: bool,
    channels_first: Collection[int],
) -> ModelRun:
    """Run a copy of a PyTorch module, and keep the outputs at the values of `names`."""
    import torch

    # The caller may have turned gradients off, but gradients are compared here.
    with torch.inference_mode(False), torch.enable_grad():
        return _run_torch(torch_model, names, x, train, channels_first)


def _run_torch(
    torch_model: torch.nn.Module,
    names: Mapping[str, str],
    x: np.ndarray,
    train: bool,
    channels_first: Collection[int],
) -> ModelRun:
    import torch

    model = copy.deepcopy(torch_model).train(train)
    modules = dict(model.named_modules())
    _require_known(names, modules)
    calls: Counter[str] = Counter()
    values, zeros = {}, {}

    def to_flax(tensor: torch.Tensor) -> np.ndarray:
        value = np.asarray(array(tensor))
        return np.moveaxis(value, 1, -1) if value.ndim in channels_first else value

    def to_torch(value: np.ndarray) -> np.ndarray:
        return np.moveaxis(value, -1, 1) if value.ndim in channels_first else value

    def hook(name: str):
        def keep_output(module, args, output):
            _require_array("PyTorch", names[name], output, torch.Tensor)
            calls[names[name]] += 1
            # Copied, because later layers may write into it, as an in-place ReLU does.
            values[name] = output.detach().clone()
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return keep_output

    for name, module_name in names.items():
        modules[module_name].register_forward_hook(hook(name))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # JAX decides the dtype: without its 64-bit types, float64 becomes float32.
    tensor = torch.tensor(to_torch(np.asarray(jnp.asarray(x))), device=device)
    if tensor.is_floating_point():
        zeros[INPUT] = torch.zeros_like(tensor, requires_grad=True)
        tensor = tensor + zeros[INPUT]
    output = model(tensor)
    _require_array("PyTorch", OUTPUT, output, torch.Tensor)
    _require_one_call("PyTorch", names.values(), calls)
    values[OUTPUT] = output.detach()
    cotangent = to_torch(cotangent_of(to_flax(output).shape))
    output.backward(torch.tensor(cotangent).to(output))
    # An intermediate that does not affect the output has no gradient in PyTorch; JAX's is zero.
    gradients = {k: torch.zeros_like(z) if z.grad is None else z.grad for k, z in zeros.items()}
    return ModelRun(
        {k: to_flax(v) for k, v in values.items()},
        {k: to_flax(v) for k, v in gradients.items()},
        of_torch(modules),
    )


def _require_array(framework: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"only single arrays can be compared; in {framework}, {name} returns a "
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
            f"each name must be called exactly once; calls in {framework}: {wrong}. These are "
            f"called once: {sorted(k for k, n in calls.items() if k and n == 1)}."
        )
