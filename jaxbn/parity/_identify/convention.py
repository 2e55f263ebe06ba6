"""Identify a layer's convention, and check it on batches that it was not derived from."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn.parity._identify.black_box import BATCH_SIZES, BlackBox, over_biased, probe_batch
from jaxbn.parity._identify.common_size import with_common_size
from jaxbn.parity._identify.normalization import (
    Normalization,
    find_normalization,
    shrink_running_variance,
)
from jaxbn.parity._identify.running_average import RunningAverage, find_running_average
from jaxbn.parity._layer import Layer


def identify(layer: Layer, num_features: int) -> Mapping[str, Any]:
    """Return the convention of a batch norm, as keyword arguments of `batch_norm`.

    The layer is called as a black box: about a hundred training steps on batches made for the
    purpose, and some evaluations, show how it averages, which variances it uses and what it adds to
    them. Finally, the convention has to predict the layer's outputs and statistics on batches that
    it was not derived from. All this trains the layer, so pass a copy of a layer that you still
    need.

    Args:
      layer: anything with `train(x) -> y` (one training step), `evaluate(x) -> y` and
        `running() -> (mean, var)`; x and y are (N, C), mean and var (C,), x is float32. It may have
        been trained, and may have any scale and bias. `jaxbn.parity.torch_layer` and its siblings
        wrap the layers of the frameworks.
      num_features: C.

    Returns:
      `momentum` (accurate to 1e-3; None if all batches have the same weight, for which `batch_norm`
      needs a `count`), `epsilon` (accurate to 10 % from 1e-6 to 1e-1), `batch_variance` and
      `running_variance`. Pass them on as `batch_norm(..., **identify(layer, 16))`. Each number is
      the shortest decimal within the error of the measurement.

      If training does not move the running statistics at all, `momentum` is 1 (0 in PyTorch), and
      there is no `running_variance`, because nothing shows it.

      A different epsilon in evaluation is noticed if it is visible beside the running variances
      that occur: at the usual initial variance of 1, if it differs by more than 1e-4 and 5 %, and
      less if momentum is below 0.9. Behaviour that starts after more steps than these, such as an
      average that is cumulative at first and has a momentum later, is not noticed. Neither is
      behaviour at values beyond those of the batches, nor a momentum above 0.9998.

    Raises:
      ConventionError: the layer follows none of `batch_norm`'s conventions. The text, and its
        attributes `probe` and `reason`, say where it differs. Bias-corrected averages, and an
        epsilon added to the standard deviation, are recognized and named, with their numbers in
        `found`.
      ValueError: `num_features` is not positive.

    Example:
      >>> import jaxbn, jaxbn.parity
      >>> params, state = jaxbn.init((8, 4))
      >>> layer = jaxbn.parity.batch_norm_layer(params, state, **jaxbn.KERAS)
      >>> for name, value in jaxbn.parity.identify(layer, 4).items():
      ...     print(name, value)
      momentum 0.99
      epsilon 0.001
      batch_variance biased
      running_variance biased
    """
    if num_features < 1:
        raise ValueError(f"num_features is {num_features}; it must be at least 1.")
    box = BlackBox(with_common_size(layer, num_features), num_features)
    box.probe = "evaluation"
    # Before any training step: a larger running variance may later hide an epsilon.
    mean, var = box.running()
    x = probe_batch(BATCH_SIZES[-1], mean, np.sqrt(var + 1e-3), num_features)
    before_training = (x, box.evaluate(x), mean, var)

    average = find_running_average(box)
    normalization = find_normalization(box)
    if average.kind != "fixed":
        shrink_running_variance(box, normalization.epsilon)

    box.probe = "evaluation"
    _check_evaluation(box, normalization, *before_training)
    mean, var = box.running()
    x = probe_batch(BATCH_SIZES[-1], mean, np.sqrt(var + normalization.epsilon), num_features)
    _check_evaluation(box, normalization, x, box.evaluate(x), mean, var)
    rng = np.random.default_rng(0)
    for deviation in (normalization.epsilon**0.5, 0.5):
        x = deviation * (0.5 + rng.normal(size=(BATCH_SIZES[-1], num_features)))
        _check_new_batch(box, average, normalization, x.astype(np.float32))

    _refuse_what_has_no_keyword(box)
    names = ("momentum", "epsilon", "batch_variance", "running_variance")
    return {name: box.found[name] for name in names if name in box.found}


def _check_evaluation(
    box: BlackBox,
    normalization: Normalization,
    x: np.ndarray,
    y: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
) -> None:
    """Fail unless `y` is `x` normalized with the running statistics."""
    if not _is_normalized(normalization, x, y, mean, var):
        box.fail(
            "the output is not x normalized with the running statistics and with training's scale, "
            f"bias and epsilon, {normalization.epsilon:.3g} (running variance "
            f"{var.min():.2g} to {var.max():.2g})"
        )


def _check_new_batch(
    box: BlackBox, average: RunningAverage, normalization: Normalization, x: np.ndarray
) -> None:
    """Fail unless the findings predict a training step on `x` and the evaluation after it."""
    size = len(x)
    mean, var = x.mean(0, np.float64), x.var(0, np.float64)
    before = box.running()
    box.probe = "training output"
    y = box.train(x)
    batch_var = var * over_biased(normalization.estimator, size)
    if not _is_normalized(normalization, x, y, mean, batch_var):
        box.fail("the other findings do not predict the output for a new batch")
    after = box.running()
    weight = average.weight(box.steps)
    averaged_var = var * over_biased(box.found.get("running_variance", "biased"), size)
    for name, old, new, value in zip(
        ("mean", "variance"), before, after, (mean, averaged_var), strict=True
    ):
        box.probe = f"running {name}"
        expected = old + weight * (value - old)
        rounding = 3e-6 * (np.abs(old) + weight * np.abs(value) + 1e-12)
        if (np.abs(new - expected) > 2e-3 * weight * np.abs(value - old) + rounding).any():
            box.fail(
                "the findings do not predict it after a new batch: it moved by "
                f"{np.median((new - old) / (value - old)):.4g} of the distance to the batch's, not "
                f"{weight:.4g}"
            )
    box.probe = "evaluation"
    _check_evaluation(box, normalization, x, box.evaluate(x), *after)


def _is_normalized(
    normalization: Normalization, x: np.ndarray, y: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> bool:
    """Return whether `y` is `x` normalized, within float32 and the precision of epsilon."""
    x = x.astype(np.float64)
    slope = normalization.slope(var)
    expected = slope * (x - mean) + normalization.bias
    # The shortest decimal may be off by one percent of epsilon, of which half enters the slope.
    uncertain = 1e-5 + 0.015 * normalization.epsilon / (var + normalization.epsilon)
    if not normalization.in_variance:
        uncertain = 1e-5 + 0.03 * normalization.epsilon / (np.sqrt(var) + normalization.epsilon)
    rounding = 1e-5 * np.abs(normalization.bias) + 2e-6 * np.abs(slope) * (np.abs(x) + np.abs(mean))
    # The fitted bias is the mean of outputs scale * x_hat + bias with x_hat close to -1 and 1. All
    # roundings before the sum are odd in x_hat and cancel. The rounding of the sum is at most half
    # a last place, 2^-24 (|scale| + |bias|). The same amount again allows for a batch mean that is
    # not exactly zero, as when it is updated value by value. The line above covers the bias term.
    rounding += np.finfo(np.float32).eps * np.abs(normalization.scale)
    return bool(
        (np.abs(y - expected) <= uncertain * np.abs(slope * (x - mean)) + rounding + 1e-30).all()
    )


def _refuse_what_has_no_keyword(box: BlackBox) -> None:
    if averages := box.found.get("averages"):
        box.probe = "running statistics"
        box.fail(
            f"they are {averages}: decayed sums divided by 1 - momentum**steps, which removes "
            "the initial value"
            + (" of the mean, but adds to that of the variance" if "left in" in averages else "")
        )
    if "epsilon_added_to" in box.found:
        box.probe = "epsilon"
        box.fail(
            f"{box.found['epsilon']:.3g} is added to the standard deviation, outside the square "
            "root; batch_norm adds it to the variance"
        )
