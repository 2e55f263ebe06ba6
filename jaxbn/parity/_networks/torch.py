"""Run a copy of a PyTorch module, and record its submodules by hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Self

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._entries import array
from jaxbn.parity._adapters.torch import tensor_of, torch_layer
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._networks.network import (
    INPUT,
    OUTPUT,
    Call,
    Run,
    StatisticsByName,
    cotangent_of,
    require_array,
    require_one_call,
)
from jaxbn.parity._networks.torch_checks import check_inputs, dtype_name
from jaxbn.parity._networks.torch_layers import facts_of

if TYPE_CHECKING:
    import torch


class TorchNetwork:
    """A PyTorch module, which is copied for each run.

    Args:
      label: what messages call the network.
      model: the module.
      channels_first: the numbers of dimensions of the arrays that have their channels first here,
        and last in Flax.
    """

    def __init__(self, label: str, model: torch.nn.Module, channels_first: Collection[int]):
        self.label, self.model, self.channels_first = label, model, channels_first

    def check_dtype(self, x: np.ndarray) -> None:
        self._tensor(x)

    def calls(self, x: np.ndarray, train: bool) -> list[Call]:
        import torch

        calls: list[Call] = []
        returned: list[tuple[weakref.ref, int, str]] = []
        facts = {name: facts_of(module) for name, module in self.model.named_modules()}

        def keep_call(name, args, kwargs, output):
            layer = facts[name]
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)][:1]
            source = None
            for ref, version, other in reversed(returned):
                # A tensor that was written to since has another version.
                if given and ref() is given[0] and given[0]._version == version:
                    source = other
                    break
            calls.append(Call(name, layer, source, False))
            if layer is not None and isinstance(output, torch.Tensor):
                returned.append((weakref.ref(output), output._version, name))

        with torch.inference_mode(False), torch.no_grad():
            model = self._copy(x, train)
            for name, module in model.named_modules():
                module.register_forward_hook(
                    lambda module, *call, name=name: keep_call(name, *call), with_kwargs=True
                )
            model(self._tensor(x))
        return calls

    def run(self, names: Sequence[str], x: np.ndarray, train: bool) -> Run:
        import torch

        unknown = [name for name in names if name not in dict(self.model.named_modules())]
        if unknown:
            known = sorted(name for name, _ in self.model.named_modules() if name)
            raise ValueError(
                f"names has {unknown}, which {self.label} does not have; it has {known}."
            )
        # The caller may have turned gradients off, but gradients are compared here.
        with torch.inference_mode(False), torch.enable_grad():
            return self._run(names, x, train)

    def _run(self, names: Sequence[str], x: np.ndarray, train: bool) -> Run:
        import torch

        model = self._copy(x, train)
        modules = dict(model.named_modules())
        calls: list[str] = []
        values, zeros, norm_inputs = {}, {}, {}
        dropouts: list[str] = []

        def keep_output(name, args, kwargs, output):
            require_array(self.label, name, output, torch.Tensor)
            calls.append(name)
            facts = facts_of(modules[name])
            if facts is not None and facts.kind == "batch norm":
                rows = np.moveaxis(np.asarray(array(next(iter((*args, *kwargs.values()))))), 1, -1)
                # Copied, because the norm or a later layer may write into its input.
                norm_inputs[name] = rows.reshape(-1, rows.shape[-1]).copy()
            values[name] = output.detach().clone()
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        def keep_dropout(name, module):
            if module.training and module.p > 0:
                dropouts.append(name)

        for name, module in modules.items():
            if name in names:
                module.register_forward_hook(
                    lambda module, *call, name=name: keep_output(name, *call), with_kwargs=True
                )
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.register_forward_pre_hook(
                    lambda module, args, name=name: keep_dropout(name, module)
                )
        tensor = self._tensor(x)
        if tensor.is_floating_point():
            zeros[INPUT] = torch.zeros_like(tensor, requires_grad=True)
            tensor = tensor + zeros[INPUT]
        output = model(tensor)
        require_array(self.label, OUTPUT, output, torch.Tensor)
        require_one_call(self.label, names, calls)
        values[OUTPUT] = output.detach()
        cotangent = self._to_torch(cotangent_of(self._to_flax(output).shape))
        output.backward(torch.tensor(cotangent).to(output))
        # An intermediate that does not affect the output has no gradient in PyTorch; JAX's is zero.
        gradients = {k: torch.zeros_like(z) if z.grad is None else z.grad for k, z in zeros.items()}
        return Run(
            {k: self._to_flax(v) for k, v in values.items()},
            {k: self._to_flax(v) for k, v in gradients.items()},
            _statistics(modules),
            norm_inputs,
            dropouts,
        )

    def batch_norm(self, name: str) -> DifferentiableLayer | None:
        module = self.model.get_submodule(name)
        return torch_layer(module) if getattr(module, "running_mean", None) is not None else None

    def astype(self, dtype: str) -> Self:
        import torch

        model = copy.deepcopy(self.model).to(getattr(torch, dtype))
        return type(self)(self.label, model, self.channels_first)

    def _copy(self, x: np.ndarray, train: bool) -> torch.nn.Module:
        """Return a copy in this mode, which checks the layout and dtype of its layers' inputs."""
        model = copy.deepcopy(self.model).train(train)
        check_inputs(self.label, model, x, self.channels_first)
        return model

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        """Return the input as a tensor of the model's device, with channels first."""
        import torch

        first = next(self.model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        # JAX decides the dtype: without its 64-bit types, float64 becomes float32.
        tensor = tensor_of(self._to_torch(np.asarray(jnp.asarray(x)))).to(device)
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        own = next(floating, tensor.dtype)
        if tensor.is_floating_point() and own != tensor.dtype:
            raise ValueError(_dtype_message(self.label, own, tensor.dtype))
        return tensor

    def _to_flax(self, tensor: torch.Tensor) -> np.ndarray:
        value = np.asarray(array(tensor))
        return np.moveaxis(value, 1, -1) if value.ndim in self.channels_first else value

    def _to_torch(self, value: np.ndarray) -> np.ndarray:
        return np.moveaxis(value, -1, 1) if value.ndim in self.channels_first else value


def _dtype_message(label: str, own: torch.dtype, got: torch.dtype) -> str:
    own_name, name = dtype_name(own), dtype_name(got)
    text = f"the parameters in {label} are {own_name}, but x is {name}"
    if own_name == "float64" and jnp.zeros(()).dtype != jnp.float64:
        return (
            f"{text}, since JAX's 64-bit types are off: call "
            "jax.config.update('jax_enable_x64', True) first, or compare in float32 with "
            "model.float()."
        )
    return f"{text}: pass x.astype('{own_name}'), or convert the model to {name}."


def _statistics(modules: dict[str, torch.nn.Module]) -> StatisticsByName:
    found = {}
    for name, module in modules.items():
        mean, var = (getattr(module, f"running_{k}", None) for k in ("mean", "var"))
        if mean is not None and var is not None:
            found[name] = (np.asarray(array(mean)), np.asarray(array(var)))
    return found
