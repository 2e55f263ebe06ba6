"""A batch norm in NumPy in which faults can be planted, and batches to find them with."""

import numpy as np

from tests.numpy_layers import NumpyBatchNorm

FEATURES = 6
N = 32


class BatchNorm(NumpyBatchNorm):
    """The textbook's batch norm in float64, rounded to float32, with a keyword per fault.

    Without any of them it is correct.
    """

    def __init__(
        self,
        *,
        scale=1.0,
        bias=0.0,
        start=(0.0, 1.0),
        per_example=False,
        naive_variance=False,
        batch_in_evaluation=False,
        frozen=False,
        constants="none",
        rounded_to=np.float32,
        features=FEATURES,
        **convention,
    ):
        rng = np.random.default_rng(0)
        super().__init__(rng, features=features, dtype=np.float64, **convention)
        self.scale = np.linspace(0.5, 2, features) * scale
        self.bias = np.linspace(-1, 1, features) + bias
        self.mean, self.var = (np.full(features, v, np.float32) for v in start)
        self.per_example, self.naive_variance = per_example, naive_variance
        self.batch_in_evaluation, self.frozen = batch_in_evaluation, frozen
        self.constants, self.rounded_to = constants, rounded_to

    def statistics(self, x, ddof):
        mean, var = super().statistics(x, ddof)
        if self.naive_variance:
            single = x.astype(np.float32)
            biased = np.float64(np.maximum((single**2).mean(0) - single.mean(0) ** 2, 0))
            var = biased * len(x) / (len(x) - ddof)
        return mean, var

    def track(self, x):
        if not self.frozen:
            super().track(x)

    def normalized(self, x, mean, var):
        y = super().normalized(x, mean, var)
        return y.astype(self.rounded_to).astype(np.float32)

    def normalized_with_batch(self, x):
        if self.per_example:
            return self.normalized(x, x.mean(1, keepdims=True), x.var(1, keepdims=True))
        return super().normalized_with_batch(x)

    def evaluate(self, x):
        if self.per_example or self.batch_in_evaluation:
            return self.normalized_with_batch(x.astype(self.dtype))
        return self.normalized(x, self.mean, self.var)


class DifferentiableBatchNorm(BatchNorm):
    def step(self, x, dy):
        mean, var = self.statistics(x.astype(np.float64), self.ddof)
        std = np.sqrt(var + self.epsilon)
        x_hat = (x - mean) / std
        dx = dy.astype(np.float64)
        if self.constants in ("none", "variance"):
            dx = dx - dx.mean(0)
        if self.constants == "none":
            dx = dx - x_hat * (dy * x_hat).sum(0) / (len(x) - self.ddof)
        grads = {"x": self.scale / std * dx, "scale": (dy * x_hat).sum(0), "bias": dy.sum(0)}
        return self.train(x), {k: v.astype(np.float32) for k, v in grads.items()}


def batches(rng, *, n=N, mean=0.5, steps=3, features=FEATURES):
    """Make batches of features whose deviations differ, all `mean` deviations from zero."""
    deviation = np.geomspace(0.1, 3, features)
    return [
        (deviation * (mean + rng.normal(size=(n, features)))).astype(np.float32)
        for _ in range(steps)
    ]
