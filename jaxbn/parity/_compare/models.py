"""Compare a network in Flax with one in PyTorch, intermediate by intermediate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbn.parity._compare.model_runs import INPUT, OUTPUT, ModelRun, run_flax, run_torch
from jaxbn.parity._compare.model_statistics import pairs_and_notes
from jaxbn.parity._compare.report import Report, Row, checked_rtol, measure

if TYPE_CHECKING:
    import flax.linen as nn
    import torch


_EVALUATION = MappingProxyType({"train": False})
_TRAINING = MappingProxyType({"train": True})


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
    """Run two networks on one input, and report at which intermediate they first differ.

    Both run in evaluation and in training, forward, and backward from `sum(output * cotangent)`
    for a fixed random cotangent. Gradients are with respect to the intermediates. After the
    training step, the running statistics of the named submodules are compared; the report notes
    which statistics no name covers.

    Args:
      flax_model: a Linen module that is bound, `model.bind(variables)`, or the pair
        `(model, variables)`.
      torch_model: the network that it should agree with. It is copied, not changed.
      names: for each intermediate, the path of the submodule in Flax ("ResBlock_0/BatchNorm_1") and
        its name in PyTorch ("blocks.0.bn2"), in the order in which they are computed. At least one
        is needed. The input and the output of the network are always compared. Submodules inside
        `nn.remat`, `nn.scan` or another lifted transformation cannot be named.
      x: the input in Flax's layout, a batch of images (N, H, W, C), in the dtype of both networks.
      evaluation: the keyword arguments of a call of the Flax model in evaluation.
      training: the keyword arguments of a call in training. Layers that draw random numbers, such
        as dropout, will differ.
      channels_first: the numbers of dimensions of those arrays that have their channels first in
        PyTorch and last in Flax. Add 3 for one-dimensional convolutions.
      rtol: the largest relative error that counts as equal. Errors are relative to the largest
        magnitude of PyTorch's array. The default allows float32 rounding through some tens of
        layers.

    Returns:
      A report with a row per intermediate, in the order of the computation: evaluation forward,
      training forward, running statistics, evaluation backward and training backward. Its
      `first_difference` is the first row beyond `rtol`.

    Raises:
      ValueError: there are no names; one of the networks does not have a name, or does not call it
        exactly once; or `rtol` is negative, infinite or NaN.
      TypeError: a Flax module has no variables; an intermediate is not a single array; or `rtol` is
        not a number.

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
      >>> report.first_difference.stage, report.first_difference.name
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
        ours[mode] = run_flax(module, variables, list(names), x, options)
        theirs[mode] = run_torch(torch_model, names, x, mode == "training", channels_first)
    rows, notes = _rows(ours, theirs, names)
    return Report(tuple(rows), rtol, notes=tuple(notes))


def _unbound(flax_model: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    if isinstance(flax_model, tuple):
        return flax_model
    if getattr(flax_model, "scope", None) is None:
        raise TypeError(
            f"flax_model must be a bound Linen module, model.bind(variables), or the pair (model, "
            f"variables); got a {type(flax_model).__name__} without variables."
        )
    return flax_model.unbind()


def _rows(
    ours: Mapping[str, ModelRun], theirs: Mapping[str, ModelRun], names: Mapping[str, str]
) -> tuple[list[Row], list[str]]:
    """Return a row per intermediate, in the order of the computation, and what has no row."""
    rows = []
    for mode in ours:
        a, b = ours[mode], theirs[mode]
        forward = [*names, OUTPUT]
        rows += [measure(f"{mode} forward", k, a.values[k], b.values[k]) for k in forward]
    statistics = ours["training"].statistics, theirs["training"].statistics
    pairs, notes = pairs_and_notes(*statistics, names)
    for name, left, right in pairs:
        for which, one, other in zip(("mean", "var"), left, right, strict=True):
            rows.append(measure("running statistics", f"{name} {which}", one, other))
    for mode in ours:
        a, b = ours[mode], theirs[mode]
        backward = [name for name in (*reversed(list(names)), INPUT) if name in b.gradients]
        rows += [measure(f"{mode} backward", k, a.gradients[k], b.gradients[k]) for k in backward]
    return rows, notes
