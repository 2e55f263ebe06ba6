"""Exact running statistics of a whole data set."""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from jaxbn._running import Estimator
from jaxbn.calibrate._observable import observable
from jaxbn.calibrate._options import Options
from jaxbn.calibrate._passes import exact_statistics, repeatable
from jaxbn.calibrate._progress import Report, reporting
from jaxbn.calibrate._replace import replaced
from jaxbn.calibrate._together import recalibrate_together

Tree = TypeVar("Tree")


def recalibrate(
    model: Any,
    variables: Tree,
    batches: Iterable[Any],
    *,
    passes: int | None = None,
    running_variance: Estimator | None = None,
    progress: bool | Report = False,
    processes: Literal["separate", "together"] = "separate",
    **apply_kwargs: Any,
) -> Tree:
    r"""Return the variables with the exact running statistics of a whole data set.

    Each batch norm's mean and variance become those of its input in one training step on all
    batches together, as one batch: earlier layers normalize with the statistics of the whole data
    set too. The result does not depend on how the data is split into batches, as long as nothing
    else in the network is random or mixes examples. With :math:`n_i` values, mean :math:`\mu_i` and
    biased variance :math:`\sigma_i^2` in batch :math:`i`, those of the data set are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    summed in float64. This is not the mean of the variances. A layer whose `running_variance` is
    "unbiased" gets :math:`\sigma^2 n / (n - 1)`. This matters if there are few values. The training
    step normalizes with the biased variance, so its outputs are larger than those of evaluation, by
    a fraction of about :math:`1 / (2 n)`, which is 5 % for 10 values and 0.5 % for 100. With
    `running_variance="biased"`, evaluation gives the outputs of the training step.

    Use it when the running statistics no longer match the weights: after averaging (SWA, EMA),
    quantization or pruning, or on a new domain.

    This takes one pass over the data for each batch norm on the longest path through the network:
    each pass makes the next layer's statistics exact. The passes end when one changes nothing, or
    after as many passes as there are calls of batch norms.

    `passes=1` is an approximation: in each batch, earlier layers normalize with the statistics of
    that batch, because the running statistics are the ones to be replaced. If the batches are drawn
    at random, the error is proportional to 1 over the batch size. If they differ systematically, as
    in a data set that is sorted by class, it may be large. `jaxbn.health.check` measures the error
    by making all the passes. `train_examples/recalibrate` has examples.

    The calibrated layers are `jaxbn.linen.BatchNorm`, `jaxbn.nnx.BatchNorm`, Flax's own two, and
    classes derived from them, unless they are `frozen`. If any layer runs in training mode, in any
    batch, then only layers in training mode are calibrated, and the others normalize with their
    running statistics and keep them. If all run in evaluation mode, all are calibrated, and
    whatever else depends on the mode, such as dropout, behaves as in evaluation. `axis_name` and
    `virtual_batch_size` have no effect: the data set is one batch.

    A layer that is called several times normalizes each call with the statistics of that call, as
    in training, and its running statistics become those of all calls together. Batches may call a
    layer different numbers of times, or not at all, as sequences of different lengths do: the
    statistics of third calls, for example, are over the batches that have one. Calls of different
    layers must come in the same order in all batches. Calls inside a loop or branch of JAX that
    carries the statistics, such as `nn.scan` with `variable_carry="batch_stats"`, cannot be
    distinguished, and raise an error. `nn.scan` over layers, each with its own statistics, works.

    Args:
      model: a `flax.linen.Module`, a `flax.nnx.Module` or a `flax.nnx.GraphDef`. It is not
        changed.
      variables: the variables of a Linen model, or an `nnx.State`, such as `nnx.state(model)` or,
        where the model is a `Module`, only its `BatchStat`. They are not changed.
      batches: the inputs of the model, each an array; or a tuple of positional arguments, such as
        an input and its mask; or a dict of keyword arguments. Arguments that are not arrays, such
        as a bool, are static: the model is compiled for each of their values. Empty batches have no
        effect. `batches` is iterated over several times; an iterator is first copied into a list.
      passes: the largest number of passes over the data, or None for the exact statistics. After k
        passes, at least the first k batch norms are exact.
      running_variance: "biased" or "unbiased", the estimator of all running variances; or None for
        the one that each layer tracks.
      progress: True to show a progress bar on stderr, which needs the package rich; or a function
        that is called after each batch with four integers: the index of the pass, the maximum
        number of passes, the index of the batch, and the number of batches, which is None in the
        first pass if `batches` has no length. Indices start at 1. The maximum number of passes is
        the number of calls of batch norms in the batches so far, or `passes` if that is smaller. In
        a program of several processes, only the first one shows the bar, and each counts its own
        batches.
      processes: whose batches the statistics are over, in a program of several processes
        (`jax.distributed`). "separate": those of this process, or global arrays, which all
        processes pass alike. "together": those of all processes. Each reads its own part of the
        data, of any number of batches or none. All processes must make the call, with the same
        model and variables, and all get the same bits. A batch that two processes pass counts
        twice.
      **apply_kwargs: further arguments of `model.apply`, or of the NNX model, such as `train=True`
        or `rngs`. `mutable` has no effect.

    Returns:
      Variables of the same structure, shapes and dtypes. Only `mean` and `var` of batch norms
      differ, in features with at least one value, or two for an unbiased variance. `count`, the
      number of training batches, is unchanged.

    Raises:
      TypeError: `model`, `variables` or `progress` has the wrong type, or `batches` is a mapping.
      ValueError: `batches` is empty or holds no values; the model calls no batch norm that is not
        frozen; there is one value per feature, which has no unbiased variance; statistics are not
        finite; a batch norm is in a loop that carries its statistics; `passes`,
        `running_variance` or `processes` is invalid. With `processes="together"`: parameters,
        `passes`, `running_variance` or running statistics that are kept differ between processes,
        or arrays are divided among the processes.
      ModuleNotFoundError: `progress` is True and rich is not installed.
      RuntimeError: the call failed in another process. The text says where and why.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.linen
      >>> from jaxbn.calibrate import recalibrate
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (1000, 4))
      >>> model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables = recalibrate(model, variables, [x[:300], x[300:]])
      >>> y = model.apply(variables, x)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    Source: the formula is that of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979; one use is section 3.2 of Izmailov et al.,
    "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """
    options = Options(processes, passes, running_variance, progress)
    options.check()
    if processes == "together":
        return recalibrate_together(model, variables, batches, apply_kwargs, options)
    observed_model = observable(model, variables, apply_kwargs)
    with reporting(progress) as report:
        calls, _ = exact_statistics(
            observed_model, repeatable(batches), most_passes=passes, report=report
        )
    new = replaced(observed_model.statistics, calls, running_variance)
    return observed_model.replace_statistics(new)
