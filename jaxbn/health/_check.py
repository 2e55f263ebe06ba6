"""Check the batch norms of a model on data."""

from collections.abc import Iterable
from typing import Any

from jaxbn.calibrate._observable import observable
from jaxbn.calibrate._passes import NothingToObserve, exact_statistics, repeatable
from jaxbn.health._layer import checked_layers, layers_in_evaluation
from jaxbn.health._layer_findings import layer_findings
from jaxbn.health._network_findings import network_findings
from jaxbn.health._outputs import output_change
from jaxbn.health._replicas import one_copy
from jaxbn.health._report import Report


def check(model: Any, variables: Any, batches: Iterable[Any], **apply_kwargs: Any) -> Report:
    r"""Report what is wrong with the batch norms of a model, by comparing them with data.

    Use it when a model is good in training and bad in evaluation. It computes the exact statistics
    of the data, as `jaxbn.calibrate.recalibrate` does, and compares the running statistics with
    them. The distance of a layer is the RMS change of its normalized output if it normalizes with
    the running statistics instead of the exact ones. With
    :math:`s = \sqrt{\sigma^2 + \epsilon}`, running statistics r and exact statistics e, and the
    mean over all features, the distance is

    .. math::

        \sqrt{E\left[\left(\frac{\mu_e - \mu_r}{s_r}\right)^2
            + \frac{\sigma_e^2}{s_e^2} \left(\frac{s_e}{s_r} - 1\right)^2\right]}

    The report also gives the change of the network's output. Each finding has one of these codes:

    - `never-updated`: the statistics still have their initial values, mean 0 and variance 1, and
      differ from those of the data by more than chance explains;
    - `off`: the distance is more than 0.5. The text gives the differences of mean and variance, and
      says whether the statistics follow a single batch (the momentum may be inverted), lag behind
      (too few updates for the momentum), or come from other data;
    - `non-finite` and `negative-variance`: some values are impossible for any data;
    - `dead-features`: the variance of the data is below epsilon;
    - `few-values`: fewer than 16 values per feature are normalized together in every batch, by a
      layer without `axis_name`;
    - `eval-differs`: the output of the network changes by more than the distances explain. Often a
      layer is called several times, on inputs with different statistics;
    - `replicas-differ`: the variables hold a copy for each of several devices (on a leading axis,
      as with `jax.pmap`, or in an array that is marked as replicated), and the copies of the
      running statistics differ. All other findings are about the first copy.

    Statistics are also `off` if the data comes from another domain than the training data, or lacks
    the augmentation of the training. Pass the training data to find lost updates, and the
    evaluation data to find a domain shift.

    The batches are iterated over about once for each batch norm, so a few batches that represent
    the data are enough for a deep network. The thresholds assume values that are not extremely
    sparse or heavy-tailed.

    Layers in evaluation mode within a model in training mode, and `frozen` layers, normalize with
    their running statistics on purpose. They are only checked for impossible values.

    Args:
      model: a `flax.linen.Module`, a `flax.nnx.Module` or a `flax.nnx.GraphDef`. It is not
        changed.
      variables: the variables of a Linen model, an `nnx.State`, or None to use the variables that
        an `nnx.Module` holds. They are not changed.
      batches: the inputs of the model, as for `jaxbn.calibrate.recalibrate`: each an array, a tuple
        of positional arguments, or a dict of keyword arguments. `few-values` and the cause of `off`
        depend on the batch size, so use that of training. In a program of several processes, each
        checks its own batches.
      **apply_kwargs: further arguments of `model.apply`, or of the NNX model, such as `train=False`
        or `rngs`. `mutable` has no effect.

    Returns:
      A `Report` with `findings`, `layers` and `ok`. Print it for a table of the layers and advice.

    Raises:
      TypeError: `model` or `variables` has another type, or `batches` is a mapping.
      ValueError: `batches` is empty or holds no values; the model calls no batch norm; the
        statistics of the data are not finite; or the variables hold copies with different
        parameters.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.linen
      >>> from jaxbn.health import check
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (1000, 4))
      >>> model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> report = check(model, variables, [x[:500], x[500:]])
      >>> [(finding.path, finding.code) for finding in report.findings]
      [('layers_1', 'never-updated')]
      >>> variables = jaxbn.calibrate.recalibrate(model, variables, [x])
      >>> check(model, variables, [x[:500], x[500:]]).ok
      True
    """
    if variables is None:
        variables = _own_variables(model)
    batches = repeatable(batches)
    variables, findings = one_copy(model, variables, batches, apply_kwargs)
    observed_model = observable(model, variables, apply_kwargs)
    try:
        calls, observe = exact_statistics(observed_model, batches)
    except NothingToObserve:
        frozen = layers_in_evaluation(observed_model, {}).values()
        if not frozen:
            raise
        findings += [finding for layer in frozen for finding in layer_findings(layer)]
        return Report(tuple(layer.row for layer in frozen), None, tuple(findings))
    in_evaluation = layers_in_evaluation(observed_model, calls).values()
    spoiled = [finding for layer in in_evaluation for finding in layer_findings(layer)]
    if spoiled:
        # The inputs of later layers would be meaningless.
        return Report(tuple(layer.row for layer in in_evaluation), None, (*findings, *spoiled))

    by_path = checked_layers(observed_model, calls, observe, batches)
    running = {path: by_path[path].prescribed for path in calls}
    change = output_change(observe, batches, running, calls)

    layers = tuple(by_path.values())
    for layer in layers:
        findings += layer_findings(layer)
    findings += network_findings(layers, change, findings)
    return Report(tuple(layer.row for layer in layers), change, tuple(findings))


def _own_variables(model: Any) -> Any:
    from flax import nnx

    if isinstance(model, nnx.Module):
        return nnx.state(model)
    raise TypeError(
        f"variables must be given, got None: only a flax.nnx.Module holds its own variables, and "
        f"model is a {type(model).__name__}."
    )
