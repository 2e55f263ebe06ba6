"""PyTorch's batch norm behind the contenders' interface, in the memory layout of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import jaxbn
from jaxbn.parity._oracle import Result

if TYPE_CHECKING:
    import torch

    from benchmarks.contenders import Arrays, Problem


class Batch(NamedTuple):
    x: torch.Tensor
    dy: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def device(backend: str) -> str:
    """Return PyTorch's name of the device that JAX runs on, or raise RuntimeError."""
    import torch

    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise RuntimeError(f"JAX runs on {backend}, where this PyTorch {torch.__version__} does not")


class TorchContender:
    """PyTorch run eagerly, as it usually is. It updates the running statistics in place."""

    def __init__(self, device: str, problem: Problem):
        import torch

        self.torch, self.device = torch, device
        self.dtype = getattr(torch, problem.dtype)
        # Features are always on axis 1, and last in memory if the strides say so.
        self.features_last = problem.axis != 1 and len(problem.shape) > 2

    def put(self, arrays: Arrays) -> Batch:
        def tensor(value: jax.Array) -> torch.Tensor:
            # PyTorch does not take NumPy arrays of bfloat16. float32 holds their values exactly.
            return self.torch.from_numpy(np.array(value, np.float32)).to(self.device)

        x, dy = (tensor(v).to(self.dtype) for v in (arrays.x, arrays.dy))
        if self.features_last:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)
        scale, bias = tensor(arrays.scale), tensor(arrays.bias)
        for leaf in (x, scale, bias):
            leaf.requires_grad_()
        return Batch(x, dy, scale, bias, tensor(arrays.mean), tensor(arrays.var))

    def _call(self, batch: Batch, train: bool) -> torch.Tensor:
        return self.torch.nn.functional.batch_norm(
            batch.x,
            batch.mean,
            batch.var,
            batch.scale,
            batch.bias,
            train,
            1 - jaxbn.FLAX["momentum"],
            jaxbn.FLAX["epsilon"],
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def forward(self, batch: Batch) -> Any:
        with self.torch.no_grad():
            y = self._call(batch, True)
        self._wait()
        return y

    def forward_backward(self, batch: Batch) -> Any:
        y = self._call(batch, True)
        gradients = self.torch.autograd.grad(y, (batch.x, batch.scale, batch.bias), batch.dy)
        self._wait()
        return y.detach(), gradients

    def evaluate(self, batch: Batch) -> Any:
        with self.torch.no_grad():
            y = self._call(batch, False)
        self._wait()
        return y

    def numbers(self, batch: Batch) -> Result:
        y, (dx, *parameters) = self.forward_backward(batch)
        if self.features_last:
            y, dx = y.movedim(1, -1), dx.movedim(1, -1)
        tensors = (y, dx, *parameters, batch.mean, batch.var)
        return Result(*(v.detach().float().cpu().numpy() for v in tensors))
