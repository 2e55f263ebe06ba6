"""Batch norms in NumPy, each right but for the faults that are asked for."""

import numpy as np

FEATURES = 6
N = 32


class Layer:
    """The textbook in float64, rounded to float32, with one keyword per fault."""

    def __init__(
        self,
        *,
        momentum=0.9,
        epsilon=1e-5,
        ddof=0,
        running_ddof=1,
        scale=1.0,
        bias=0.0,
        start=(0.0, 1.0),
        per_example=False,
        naive_variance=False,
        batch_in_evaluation=False,
        frozen=False,
        constants="none",
        dtype=np.float32,
        features=FEATURES,
    ):
        vars(self).update(locals())
        self.scale = np.linspace(0.5, 2, features) * scale
        self.bias = np.linspace(-1, 1, features) + bias
        self.mean, self.var = (np.full(features, v, np.float32) for v in start)
        self.count = 0

    def statistics(self, x, ddof):
        """The mean and variance that the layer takes `x` to have."""
        x = x.astype(np.float64)
        mean = x.mean(0)
        if self.naive_variance:
            single = x.astype(np.float32)
            var = np.float64(np.maximum((single**2).mean(0) - single.mean(0) ** 2, 0))
        else:
            var = x.var(0)
        return mean, var * len(x) / (len(x) - ddof)

    def normalize(self, x, mean, var):
        y = self.scale * (x - mean) / np.sqrt(var + self.epsilon) + self.bias
        return y.astype(self.dtype).astype(np.float32)

    def train(self, x):
        mean, var = self.statistics(x, self.running_ddof)
        self.count += 1
        momentum = 1 - 1 / self.count if self.momentum is None else self.momentum
        if not self.frozen:
            self.mean = (momentum * self.mean + (1 - momentum) * mean).astype(np.float32)
            self.var = (momentum * self.var + (1 - momentum) * var).astype(np.float32)
        if self.per_example:
            mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        else:
            mean, var = self.statistics(x, self.ddof)
        return self.normalize(x, mean, var)

    def evaluate(self, x):
        if self.per_example:
            return self.normalize(x, x.mean(1, keepdims=True), x.var(1, keepdims=True))
        if self.batch_in_evaluation:
            return self.normalize(x, *self.statistics(x, self.ddof))
        return self.normalize(x, self.mean, self.var)

    def running(self):
        return self.mean, self.var


class WithGradients(Layer):
    def step(self, x, dy):
        mean, var = self.statistics(x, self.ddof)
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
    """Batches of features whose deviations differ, all `mean` deviations from zero."""
    deviation = np.geomspace(0.1, 3, features)
    return [
        (deviation * (mean + rng.normal(size=(n, features)))).astype(np.float32)
        for _ in range(steps)
    ]
