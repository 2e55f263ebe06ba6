"""Compare two networks, intermediate by intermediate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxbn.parity._compare.model_diagnosis import diagnose_models
from jaxbn.parity._compare.model_runs import checked_input, checked_names, run_both
from jaxbn.parity._compare.report import Report, checked_rtol, measure
from jaxbn.parity._networks.make import make_networks
from jaxbn.parity._networks.options import CallOptions


def compare_models(
    candidate: Any,
    reference: Any,
    x: np.ndarray,
    names: Mapping[str, str] | None = None,
    *,
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    channels_first: Collection[int] = (4, 5),
    rtol: float = 1e-4,
) -> Report:
    """Run two networks on one input, and report at which intermediate they first differ, and why.

    Both run in evaluation and in training, forward, and backward from `sum(output * cotangent)`
    for a fixed random cotangent. Gradients are with respect to the intermediates. After the
    training step, the running statistics of the named submodules are compared. The report notes
    statistics that no name covers, and a network whose statistics do not depend on the mode if
    those of the other do. Networks in JAX are compiled once for each mode.

    If the networks differ, the first batch norm that differs and its counterpart are trained by
    `compare` on some of the inputs that they received, and the report contains its diagnosis.

    Args:
      candidate: the network to check: a Linen module, bound, `model.bind(variables)`, or in the
        pair `(model, variables)`; an NNX module, or the parts that `nnx.split` returns for it; a
        built Keras model on the JAX backend; or a PyTorch module. It is not changed.
      reference: the network that it should agree with, of any of these kinds. It is not changed.
      x: the input in Flax's layout, a batch of images (N, H, W, C), in the dtype of both networks.
      names: a mapping from the name of each submodule of the candidate ("ResBlock_0/BatchNorm_1")
        to its name in the reference ("blocks.0.bn2"), in the order in which they are computed. The
        input and the output of the network are always compared. By default, all layers that
        `match_names` finds. Submodules inside `nn.remat`, `nn.scan` or another transformation
        cannot be compared.
      evaluation: the keyword arguments for calling a Flax model in evaluation. By default, those of
        the usual ones that its `__call__` accepts: `train=False`, `training=False`,
        `is_training=False`, `deterministic=True` and `use_running_average=True`.
      training: the keyword arguments for calling it in training. Layers that draw random numbers,
        such as dropout, will differ, and the report notes which dropouts are active.
      channels_first: the ranks of arrays whose channels come first in PyTorch and last in Flax. Add
        3 for one-dimensional convolutions.
      rtol: the largest relative error that counts as equal. Errors are relative to the largest
        magnitude of the reference's array. The default allows float32 rounding through some tens of
        layers.

    Returns:
      A report with one row per quantity, in the order of the computation: evaluation forward,
      training forward, running statistics, evaluation backward and training backward. Its
      `first_difference` is the first row beyond `rtol`.

    Raises:
      ValueError: `names` is empty; a network does not have one of the submodules, or does not call
        it exactly once; `match_names` raises; `x` has its channels first, or its rank is not in
        `channels_first`; a layer of PyTorch gets integers, or a dtype that is not its model's; or
        `rtol` is negative, infinite or NaN.
      TypeError: a network is of an unknown kind or has no variables; an intermediate is not a
        single array; `names` is not a mapping; or `rtol` is not a number.

    Example:
      >>> import flax.linen as nn, jax, numpy as np, torch
      >>> from jaxbn.parity import compare_models
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
      ...         return nn.relu(x)
      >>> x = np.random.default_rng(0).normal(1, 2, (64, 3)).astype(np.float32)
      >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
      >>> ours = Net()
      >>> variables = ours.init(jax.random.key(0), x, train=False)
      >>> report = compare_models((ours, variables), theirs, x)
      >>> report.first_difference.stage, report.first_difference.name
      ('running statistics', 'norm mean')
      >>> for reason in report.diagnosis:
      ...     print(reason)
      norm: momentum 0.99 against 0.9
      norm: running variance differs by n/(n-1) = 32/31: biased against unbiased
    """
    rtol = checked_rtol(rtol)
    x = checked_input(x)
    options = CallOptions(evaluation, training)
    ours, theirs = make_networks(candidate, reference, options, channels_first)
    for network in (ours, theirs):
        network.check_dtype(x)
    names, notes = checked_names(ours, theirs, names, x)
    runs = run_both(ours, theirs, names, x)
    rows = tuple(measure(*quantity) for quantity in runs.quantities())
    diagnosis = diagnose_models(ours, theirs, runs, rows, rtol)
    return Report(rows, rtol, diagnosis, (*notes, *runs.notes(ours, theirs)))
