"""The oracle agrees with finite differences, and its measure of error with known errors."""

import numpy as np
import pytest

from tests import oracle


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_oracle_gradients_are_the_slopes_of_its_output(rng, ddof, masked):
    x, dy, scale, bias = (rng.normal(size=s) for s in [(6, 3), (6, 3), (3,), (3,)])
    mask = rng.random((6, 3)) < 0.7 if masked else None

    def loss(x, scale, bias):
        return (oracle.batch_norm(x, dy, scale, bias, ddof=ddof, mask=mask).y * dy).sum()

    result = oracle.batch_norm(x, dy, scale, bias, ddof=ddof, mask=mask)
    step = np.longdouble(1e-6)
    arguments = [x, scale, bias]
    for k, gradient in enumerate([result.dx, result.dscale, result.dbias]):
        for index in np.ndindex(gradient.shape):
            ends = []
            for sign in (1, -1):
                moved = [a.astype(np.longdouble) for a in arguments]
                moved[k][index] += sign * step
                ends.append(loss(*moved))
            # Central differences err by step^2 times a third derivative of order one.
            assert abs((ends[0] - ends[1]) / (2 * step) - gradient[index]) < 1e-9


def test_error_is_relative_to_the_largest_value():
    assert oracle.error([1.0, 4.0], [1.0, 2.0]) == 1.0
    assert oracle.error([0.5], [0.0]) == 0.5


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_oracle_is_the_textbook_feature_by_feature(rng, ddof, masked):
    x, dy = rng.normal(3, 2, size=(2, 4, 5, 3))
    scale, bias = rng.normal(size=(2, 5))
    mask = rng.random((4, 1, 3)) < 0.7 if masked else None
    result = oracle.batch_norm(x, dy, scale, bias, axis=1, epsilon=0.1, ddof=ddof, mask=mask)
    valid = np.ones((4, 3), bool) if mask is None else mask[:, 0]
    for c in range(5):
        values = x[:, c][valid]
        std = np.sqrt(values.var(ddof=ddof) + 0.1)
        y = np.where(valid, scale[c] * (x[:, c] - values.mean()) / std + bias[c], bias[c])
        for found, wanted in (
            (result.y[:, c], y),
            (result.mean[c], values.mean()),
            (result.var[c], values.var()),
            (result.dbias[c], dy[:, c].sum()),
        ):
            # NumPy's float64, of order one to ten.
            np.testing.assert_allclose(found.astype(float), wanted, rtol=1e-13, atol=1e-13)
