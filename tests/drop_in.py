"""What the tests share that change one import of a Flax model: inputs, a model, a comparison."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from tests import close

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(1, 2, (8, 6)).astype(np.float32)
X_OF_4 = np.ascontiguousarray(X[:, :4])

# Values of order one and sums of a few dozen of them: each layer is within some roundings of the
# exact result, and E[x²] - E[x]² loses another digit or two.
TOLERANCE = 1e-5


def assert_close(got: Any, wanted: Any, tolerance: float = TOLERANCE) -> None:
    close.assert_close(got, wanted, tolerance)


def arrays(module: nnx.Module) -> Any:
    """Return names and arrays of a module's parameters and statistics."""
    return nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat)))


class Block(nnx.Module):
    def __init__(self, norm, rngs, **options):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.bn = norm(4, **options, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.dropout(self.bn(self.linear(x))))
