"""Run a training step in the form of any platform, and check its errors."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn.parity._hard_inputs import C, N
from tests import forms, oracle
from tests.hard_inputs import IMAGES

_RNG = np.random.default_rng(1)
SCALE, BIAS = (_RNG.uniform(0.5, 2, size=C).astype(np.float32) for _ in range(2))
DY = _RNG.normal(size=(N, C)).astype(np.float32)

# 8 roundings: y takes about four, and sums over the batch, which XLA adds up in a tree, a few.
TOLERANCE = 1e-6
# XLA for CPUs adds complex numbers, the form of two sums on a GPU, one by one. Each of the N
# additions rounds by up to 2^-24 of the sum, at random.
COMPLEX_TOLERANCE = 2 * N**0.5 * 2**-24
GRADIENTS = ("dx", "dscale", "dbias")
# Squares below the least normal number are lost, and they are divided by N before they are added.
LEAST_VARIANCE = N * float(np.finfo(np.float32).tiny)


class Layout(NamedTuple):
    """Maps from N rows of C features to the layer's input, and from its output to rows."""

    into: Callable
    back: Callable
    axis: int


LAYOUTS = {
    "rows": Layout(lambda v: v, lambda v: v, -1),
    "NHWC": Layout(lambda v: v.reshape(*IMAGES[:3], -1), lambda v: v.reshape(N, -1), -1),
    "NCHW": Layout(
        lambda v: v.reshape(*IMAGES[:3], -1).transpose(0, 3, 1, 2),
        lambda v: v.transpose(0, 2, 3, 1).reshape(N, -1),
        1,
    ),
}


def step(x, dy, mask=None, scale=SCALE, bias=BIAS, axis=-1, **options) -> oracle.Result:
    """Run one training step; the running statistics become those of the batch."""
    _, state = jaxbn.init(x.shape, axis=axis)

    def forward(x, scale, bias):
        return jaxbn.batch_norm(
            {"scale": scale, "bias": bias},
            state,
            x,
            True,
            axis=axis,
            mask=mask,
            momentum=0.0,
            running_variance="biased",
            **options,
        )

    params = jnp.asarray(scale), jnp.asarray(bias)
    y, vjp, new = jax.vjp(forward, x, *params, has_aux=True)
    return oracle.Result(y, *vjp(dy), new["mean"], new["var"])


@cache
def step_in(form: str, axis: int = -1) -> Callable[..., oracle.Result]:
    compiled = forms.jit(partial(step, axis=axis), form)
    # As NumPy arrays, so that differences from the truth are in extended precision.
    return lambda *arguments: jax.tree.map(np.asarray, compiled(*arguments))


def run(form: str, layout: str, x: np.ndarray, mask: np.ndarray | None = None) -> oracle.Result:
    """Return the results for rows `x`, as rows, of one training step in a layout."""
    into, back, axis = LAYOUTS[layout]
    arguments = [into(v) for v in (x, DY, mask) if v is not None]
    y, dx, *others = step_in(form, axis)(*arguments)
    return oracle.Result(back(y), back(dx), *others)


def assert_accurate(ours: oracle.Result, truth: oracle.Result, form: str, *context: str) -> None:
    """Check results relative to their largest value, and statistics feature by feature."""
    deviation = np.sqrt(truth.var)
    errors = {key: oracle.error(getattr(ours, key), getattr(truth, key)) for key in GRADIENTS}
    errors["y"] = oracle.error(ours.y, truth.y)
    errors["mean"] = _largest(ours.mean - truth.mean, np.maximum(np.abs(truth.mean), deviation))
    errors["var"] = _largest(ours.var - truth.var, truth.var + LEAST_VARIANCE / TOLERANCE)
    for key, error in errors.items():
        tolerance = TOLERANCE
        if key in GRADIENTS and form == "cuda":
            tolerance = COMPLEX_TOLERANCE
        assert error <= tolerance, (key, form, *context)


def _largest(difference, size) -> float:
    difference = np.abs(difference)
    return float(np.max(difference / np.where(difference > 0, size, 1)))
