"""Find how a layer averages its running statistics."""

from typing import NamedTuple

import numpy as np

from jaxbn.parity._identify.black_box import (
    BATCH_SIZES,
    BlackBox,
    over_biased,
    probe_batch,
    shortest_decimal,
)

_STEPS = 8


class RunningAverage(NamedTuple):
    """The update `running <- (1 - weight) running + weight batch`.

    With `s = 1 / weight`, every kind of average follows `s <- 1 + decay * s`: one with constant
    momentum m, where s = 1 / (1 - m), the cumulative average, where s counts the batches, and a
    bias-corrected one.

    Attributes:
      kind: "constant", "cumulative", "bias-corrected", or "fixed" if it never moves.
      decay: the factor above.
      s: its value at training step `steps`. A fixed average has an infinite one.
      steps: how many training steps had been made when `s` was measured.
    """

    kind: str
    decay: float
    s: float
    steps: int

    def weight(self, step: int) -> float:
        s = self.s
        for _ in range(step - self.steps):
            s = 1 + self.decay * s
        return 1 / s


def find_running_average(box: BlackBox) -> RunningAverage:
    """Find the momentum from the running mean, and then the estimator of the running variance."""
    box.probe = "running mean"
    mean, var = box.running()
    deviation = 3 * np.maximum(np.maximum(1, np.sqrt(var)), np.abs(mean) / 10)
    weights, factors, sizes = [], [], []
    for step in range(_STEPS):
        size = BATCH_SIZES[step % len(BATCH_SIZES)]
        x = probe_batch(size, (-1) ** step * 10 * deviation, deviation, box.num_features)
        batch_mean, batch_var = x.mean(0, np.float64), x.var(0, np.float64)
        box.train(x)
        new_mean, new_var = box.running()
        if step == 0 and np.array_equal(new_mean, mean) and np.array_equal(new_var, var):
            return _fixed(box)
        each = (new_mean - mean) / (batch_mean - mean)
        weight = float(np.median(each))
        if weight < 1e-4:
            box.fail(
                f"a training step moves it by {weight:.2g} of the distance to the batch's mean, "
                "too little to measure a momentum"
            )
        if np.abs(each - weight).max() > 1e-4 * weight + 1e-5:
            box.fail(
                f"it moves by {each.min():.4g} to {each.max():.4g} of the distance to the batch's "
                "mean, which differs between features"
            )
        weights.append(weight)
        factors.append((new_var - (1 - weight) * var) / weight / batch_var)
        sizes.append(size)
        mean, var = new_mean, new_var

    average = _fit(box, weights)
    box.found["momentum"] = {
        "constant": shortest_decimal(
            average.decay, 1e-3 * min(average.decay, 1 - average.decay) + 1e-6
        ),
        "cumulative": None,
        "bias-corrected": shortest_decimal(average.decay, 1e-3 * (1 - average.decay)),
    }[average.kind]
    if average.kind == "bias-corrected":
        box.found["averages"] = "bias-corrected"
    _find_estimator(box, average, factors, sizes)
    return average


def _fixed(box: BlackBox) -> RunningAverage:
    """Return the average of a layer whose running statistics do not move in training.

    Its momentum is 1 (0 in PyTorch), unless it is frozen and also normalizes with them in training.
    """
    heights = [
        np.ptp(box.train(probe_batch(BATCH_SIZES[-1], 0, deviation, box.num_features)), 0)
        for deviation in (1.0, 30.0)
    ]
    # Normalized by their own statistics, both batches are nearly the same.
    if (heights[1] > 10 * heights[0]).any():
        box.fail(
            "training neither moves it nor normalizes with the statistics of the batch; the layer "
            "is frozen, or in evaluation"
        )
    box.found["momentum"] = 1.0
    return RunningAverage("fixed", 1.0, np.inf, box.steps)


def _find_estimator(
    box: BlackBox, average: RunningAverage, factors: list[np.ndarray], sizes: list[int]
) -> None:
    """Find the estimator of the running variance from its ratios to the biased one, per batch."""
    box.probe = "running variance"
    # A correction that ignores that the variance started from 1 shows in the first step alone.
    first = 1 if average.kind == "bias-corrected" else 0
    fits = {}
    for estimator in ("biased", "unbiased"):
        expected = np.array([over_biased(estimator, size) for size in sizes])[:, None]
        fits[estimator] = (np.abs(np.array(factors) - expected) < 0.02).all(1)
    for estimator, fit in fits.items():
        if fit[first:].all():
            box.found["running_variance"] = estimator
            if not fit.all():
                box.found["averages"] = "bias-corrected, with the initial variance left in"
            return
    measured = ", ".join(f"{np.median(f):.3g}" for f in factors[: len(BATCH_SIZES)])
    box.fail(
        f"with the momentum of the mean, batches of {BATCH_SIZES} values contribute {measured} "
        "times their biased variance; 1, 1, 1 would be the biased estimator, 2, 1.5, 1.07 the "
        "unbiased one"
    )


def _fit(box: BlackBox, weights: list[float]) -> RunningAverage:
    s = 1 / np.array(weights)
    if np.ptp(s) <= 1e-3 + 2e-5 * s.max():
        middle = float(np.median(s))
        return RunningAverage("constant", 1 - 1 / middle, middle, box.steps)
    decays = (s[1:] - 1) / s[:-1]
    decay = float(np.median(decays))
    if np.abs(decays - 1).max() < 3e-5:
        return RunningAverage("cumulative", 1.0, float(s[-1]), box.steps)
    if 0 < decay < 1 and np.ptp(decays) < 1e-3 * decay:
        return RunningAverage("bias-corrected", decay, float(s[-1]), box.steps)
    shown = ", ".join(f"{weight:.4g}" for weight in weights[:4])
    box.fail(
        f"successive batches have the weights {shown} and so on, which are neither constant nor "
        "those of a cumulative or a bias-corrected average"
    )
