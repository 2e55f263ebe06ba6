"""Which convention a batch norm follows, from what it does."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn.parity._layer import Layer
from jaxbn.parity._probes import (
    SIZES,
    Averages,
    Box,
    ConventionError,
    Normalization,
    batch,
    correction,
    normalize,
    shrink,
    track,
)


def identify(layer: Layer, num_features: int) -> Mapping[str, Any]:
    """The convention of a batch norm, as keyword arguments of `batch_norm`.

    The layer is a black box: about a hundred training steps on batches made for it, and some
    evaluations, tell how it averages, which variances it takes and what it adds to them. In the end
    what was found has to predict the layer's outputs and statistics on batches that it was not
    found from. The layer is trained meanwhile, so give a copy of one that is needed.

    Args:
      layer: anything with `train(x) -> y` (one training step), `evaluate(x) -> y` and
        `running() -> (mean, var)`; x and y are (N, C), mean and var (C,), x is float32. It may have
        been trained, and have any scale and bias. `jaxbn.parity.from_torch` and its siblings make
        one of a framework's layer.
      num_features: C.

    Returns:
      `momentum` (to 1e-3; None where all batches weigh alike, for which `batch_norm` needs a
      `count`), `epsilon` (to 10 % from 1e-6 to 1e-1), `batch_variance` and `running_variance`, to
      be splatted: `batch_norm(..., **identify(layer, 16))`. The numbers are the shortest decimals
      that cannot be told from the measured ones. An epsilon of evaluation's own is noticed as
      far as it shows beside the running variances that come up: at the usual initial variance of 1
      where it differs by more than 1e-4 and 5 %, and finer where momentum is below 0.9. What sets
      in after more steps than these, as an average that is cumulative at first and has a momentum
      then, or on values beyond the batches', cannot be seen; nor can a momentum above 0.9998.

    Raises:
      ConventionError: the layer follows none of `batch_norm`'s conventions. The text, and its
        attributes `probe` and `reason`, say where it departs; averages that are corrected for their
        start, and an epsilon added to the standard deviation, are recognized by name, with their
        numbers in `found`.
      ValueError: `num_features` is not positive.

    Example:
      >>> import jaxbn, jaxbn.parity
      >>> params, state = jaxbn.init((8, 4))
      >>> layer = jaxbn.parity.from_batch_norm(params, state, **jaxbn.KERAS)
      >>> for name, value in jaxbn.parity.identify(layer, 4).items():
      ...     print(name, value)
      momentum 0.99
      epsilon 0.001
      batch_variance biased
      running_variance biased
    """
    if num_features < 1:
        raise ValueError(f"num_features is {num_features}; it must be at least 1.")
    box = Box(layer, num_features)
    box.probe = "evaluation"
    # In the state that it came in: later ones may hide an epsilon behind a larger variance.
    mean, var = box.running()
    x = batch(SIZES[-1], mean, np.sqrt(var + 1e-3), num_features)
    first = (x, box.evaluate(x), mean, var)

    averages = track(box)
    normalization = normalize(box)
    shrink(box, normalization.epsilon)

    box.probe = "evaluation"
    _check_evaluation(box, normalization, *first)
    mean, var = box.running()
    x = batch(SIZES[-1], mean, np.sqrt(var + normalization.epsilon), num_features)
    _check_evaluation(box, normalization, x, box.evaluate(x), mean, var)
    rng = np.random.default_rng(0)
    for deviation in (normalization.epsilon**0.5, 0.5):
        x = deviation * (0.5 + rng.normal(size=(SIZES[-1], num_features)))
        _predict(box, averages, normalization, x.astype(np.float32))

    _refuse_what_has_no_keyword(box)
    names = ("momentum", "epsilon", "batch_variance", "running_variance")
    return {name: box.found[name] for name in names}


def _check_evaluation(
    box: Box,
    normalization: Normalization,
    x: np.ndarray,
    y: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
) -> None:
    if not _is_normalized(normalization, x, y, mean, var):
        box.fail(
            "the output is not x normalized with the running statistics and with training's scale, "
            f"bias and epsilon, {normalization.epsilon:.3g} (running variance "
            f"{var.min():.2g} to {var.max():.2g})"
        )


def _predict(box: Box, averages: Averages, normalization: Normalization, x: np.ndarray) -> None:
    """Fails unless a training step on `x`, and evaluation after it, go as the findings say."""
    size = len(x)
    mean, var = x.mean(0, np.float64), x.var(0, np.float64)
    before = box.running()
    box.probe = "training output"
    y = box.train(x)
    own = var * correction(normalization.estimator, size)
    if not _is_normalized(normalization, x, y, mean, own):
        box.fail("the output is not what the other findings make of a batch that is new to them")
    after = box.running()
    weight = averages.weight(box.steps)
    tracked = var * correction(box.found["running_variance"], size)
    for name, old, new, value in zip(
        ("mean", "variance"), before, after, (mean, tracked), strict=True
    ):
        box.probe = f"running {name}"
        expected = old + weight * (value - old)
        rounding = 3e-6 * (np.abs(old) + weight * np.abs(value) + 1e-12)
        if (np.abs(new - expected) > 2e-3 * weight * np.abs(value - old) + rounding).any():
            box.fail(
                "after a batch that is new to the findings it is not what they say; it moved by "
                f"{np.median((new - old) / (value - old)):.4g} of the way, not {weight:.4g}"
            )
    box.probe = "evaluation"
    _check_evaluation(box, normalization, x, box.evaluate(x), *after)


def _is_normalized(
    normalization: Normalization, x: np.ndarray, y: np.ndarray, mean: np.ndarray, var: np.ndarray
) -> bool:
    """Whether `y` is what `x` becomes, within float32 and the precision of epsilon."""
    x = x.astype(np.float64)
    slope = normalization.slope(var)
    expected = slope * (x - mean) + normalization.bias
    # One percent of epsilon is what the shortest decimal may be off; half of it enters the slope.
    uncertain = 1e-5 + 0.015 * normalization.epsilon / (var + normalization.epsilon)
    if not normalization.inside:
        uncertain = 1e-5 + 0.03 * normalization.epsilon / (np.sqrt(var) + normalization.epsilon)
    rounding = 1e-5 * np.abs(normalization.bias) + 2e-6 * np.abs(slope) * (np.abs(x) + np.abs(mean))
    # The fitted bias is the mean of outputs scale * x_hat + bias with x_hat close to -1 and 1. All
    # roundings before the sum are odd in x_hat and cancel, and that of the sum is at most half a
    # last place, 2^-24 (|scale| + |bias|). As much again is for a batch mean that is not exactly
    # zero, as an update value by value leaves it. The bias's share is in the line above.
    rounding += np.finfo(np.float32).eps * np.abs(normalization.scale)
    return bool(
        (np.abs(y - expected) <= uncertain * np.abs(slope * (x - mean)) + rounding + 1e-30).all()
    )


def _refuse_what_has_no_keyword(box: Box) -> None:
    if averages := box.found.get("averages"):
        box.probe = "running statistics"
        box.fail(
            f"they are {averages}: decayed sums divided by 1 - momentum**steps, which takes out "
            "the initial value"
            + (" of the mean, but adds to the variance's" if "left in" in averages else "")
        )
    if "epsilon_added_to" in box.found:
        box.probe = "epsilon"
        box.fail(
            f"{box.found['epsilon']:.3g} is added to the standard deviation, outside the root, "
            "where batch_norm adds it to the variance"
        )


__all__ = ["ConventionError", "identify"]
