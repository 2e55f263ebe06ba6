"""Batch norms in NumPy: the textbook's, and ones that follow no convention of `batch_norm`."""

import numpy as np


class NumpyBatchNorm:
    """The batch norm of the textbook, with random parameters and statistics.

    It computes in `dtype`, and keeps its statistics in it.
    """

    def __init__(
        self,
        rng,
        *,
        momentum=0.9,
        epsilon=1e-5,
        batch_variance="biased",
        running_variance="unbiased",
        features=5,
        dtype=np.float32,
        count=0,
    ):
        self.momentum, self.epsilon, self.dtype, self.count = momentum, epsilon, dtype, count
        self.ddof = int(batch_variance == "unbiased")
        self.running_ddof = int(running_variance == "unbiased")
        self.scale, self.bias, self.mean = rng.normal(size=(3, features)).astype(dtype)
        self.var = rng.uniform(0.1, 3, features).astype(dtype)

    def statistics(self, x, ddof):
        """Return the mean and variance that the layer computes from `x`."""
        return x.mean(0), x.var(0, ddof=ddof)

    def weight(self):
        return 1 / self.count if self.momentum is None else 1 - self.momentum

    def moved(self, old, new):
        return (old + self.dtype(self.weight()) * (new - old)).astype(old.dtype)

    def track(self, x):
        self.count += 1
        mean, var = self.statistics(x, self.running_ddof)
        self.mean, self.var = self.moved(self.mean, mean), self.moved(self.var, var)

    def normalized(self, x, mean, var):
        return self.scale * (x - mean) / np.sqrt(var + self.dtype(self.epsilon)) + self.bias

    def normalized_with_batch(self, x):
        return self.normalized(x, *self.statistics(x, self.ddof))

    def train(self, x):
        assert x.dtype == np.float32
        x = x.astype(self.dtype)
        self.track(x)
        return self.normalized_with_batch(x)

    def evaluate(self, x):
        return self.normalized(x.astype(self.dtype), self.mean, self.var)

    def running(self):
        return self.mean, self.var


class BiasCorrected(NumpyBatchNorm):
    """Haiku's averages: decayed sums from zero, divided by the sum of their weights."""

    def weight(self):
        return (1 - self.momentum) / (1 - self.momentum**self.count)


class InitialVarianceLeftIn(BiasCorrected):
    def track(self, x):
        first = self.count == 0
        super().track(x)
        if first:
            self.var = self.var + self.dtype(self.momentum / (1 - self.momentum))


class EpsilonOutside(NumpyBatchNorm):
    def normalized(self, x, mean, var):
        return self.scale * (x - mean) / (np.sqrt(var) + self.dtype(self.epsilon)) + self.bias


class Frozen(NumpyBatchNorm):
    def normalized_with_batch(self, x):
        return self.evaluate(x)

    def track(self, x):
        pass


class OwnMomentumForTheVariance(NumpyBatchNorm):
    def track(self, x):
        mean = self.mean
        super().track(x)
        self.mean = (0.8 * mean + 0.2 * x.mean(0)).astype(self.dtype)


class MomentumPerFeature(NumpyBatchNorm):
    def moved(self, old, new):
        return (old + np.linspace(0.1, 0.2, len(old)) * (new - old)).astype(self.dtype)


class WarmedUp(NumpyBatchNorm):
    def weight(self):
        return 1.0 if self.count == 1 else 0.1


class TracksDeviations(NumpyBatchNorm):
    def track(self, x):
        var = self.var
        super().track(x)
        self.var = self.moved(var, x.std(0))


class AddsEpsilonToTheTracked(NumpyBatchNorm):
    def track(self, x):
        super().track(x)
        self.var = self.var + self.dtype(0.01)


class MedianMean(NumpyBatchNorm):
    def normalized_with_batch(self, x):
        return self.normalized(x, np.median(x, 0), x.var(0))


class HalfTheBatchVariance(NumpyBatchNorm):
    def normalized_with_batch(self, x):
        return self.normalized(x, x.mean(0), x.var(0) * (1.5 if len(x) == 2 else 1))


class Clamped(NumpyBatchNorm):
    def normalized(self, x, mean, var):
        return self.scale * (x - mean) / np.sqrt(np.maximum(var, self.epsilon)) + self.bias


class NoEpsilon(NumpyBatchNorm):
    def normalized(self, x, mean, var):
        return self.scale * (x - mean) / np.sqrt(var) + self.bias


class OwnEpsilonInEvaluation(NumpyBatchNorm):
    def evaluate(self, x):
        self.epsilon, kept = 100 * self.epsilon, self.epsilon
        y = super().evaluate(x)
        self.epsilon = kept
        return y


class EvaluatesWithoutBias(NumpyBatchNorm):
    def evaluate(self, x):
        return super().evaluate(x) - self.bias


class OwnBiasInEvaluation(NumpyBatchNorm):
    """Off by little more than the rounding of an output of the layer's scale in float32, 6e-8."""

    def evaluate(self, x):
        return super().evaluate(x) + self.dtype(3e-7) * np.abs(self.scale)


class UpdatesTheMeanByValue(NumpyBatchNorm):
    """Correct, but its batch mean has the rounding errors of one update per value."""

    def normalized_with_batch(self, x):
        mean = np.zeros_like(x[0])
        for count, value in enumerate(x, 1):
            mean = mean + (value - mean) / self.dtype(count)
        return self.normalized(x, mean, x.var(0, ddof=self.ddof))


class Relu(NumpyBatchNorm):
    def train(self, x):
        return np.maximum(super().train(x) - self.bias, 0)


class Noisy(NumpyBatchNorm):
    def train(self, x):
        return super().train(x) + np.random.default_rng(self.count).normal(size=x.shape) * 0.01


class NotANumber(NumpyBatchNorm):
    def normalized(self, x, mean, var):
        return super().normalized(x, mean, var) * np.nan


class OneStatisticForAll(NumpyBatchNorm):
    def running(self):
        return self.mean[:1], self.var[:1]


class NegativeVariance(NumpyBatchNorm):
    def running(self):
        return self.mean, -self.var


class Transposed(NumpyBatchNorm):
    def evaluate(self, x):
        return super().evaluate(x).T


class NoScale(NumpyBatchNorm):
    def normalized(self, x, mean, var):
        return self.bias + 0 * x


class NormalizesRows(NumpyBatchNorm):
    def normalized_with_batch(self, x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + self.epsilon)


class RunningStatisticsInTraining(NumpyBatchNorm):
    def normalized_with_batch(self, x):
        return self.evaluate(x)
