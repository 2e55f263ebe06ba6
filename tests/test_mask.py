"""Masked-out values are not counted, not normalized, and get no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import oracle

# Statistics of order one from some ten values, in float32: ten roundings.
TOLERANCE = 1e-6


def normal(shape, seed=0):
    return (2 + 3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


MASKS = {
    "(N, C)": lambda rng: rng.random((8, 5, 3)) < 0.6,
    "rows": lambda rng: rng.random((8, 1, 1)) < 0.6,
    "without leading axes": lambda rng: np.array([[True], [False], [True], [True], [False]]),
    "everything": lambda rng: np.ones((1,), bool),
}


class TestMask:
    @pytest.fixture(params=MASKS)
    def masked(self, request, rng):
        """Return a mask, and an input whose masked-out values are NaN and inf."""
        mask = MASKS[request.param](rng)
        x = normal((8, 5, 3))
        under = np.where(rng.random(x.shape) < 0.5, np.nan, np.inf).astype(np.float32)
        return mask, np.where(mask, x, under)

    def test_training(self, masked, rng):
        mask, x = masked
        dy = rng.normal(size=x.shape).astype(np.float32)
        params = {"scale": jnp.array([2.0, 3.0, 4.0]), "bias": jnp.array([5.0, 6.0, 7.0])}
        state = jaxbn.init(x.shape)[1]

        def y(x, params):
            return jaxbn.batch_norm(params, state, x, True, momentum=0.0, mask=mask)

        out, vjp, new = jax.vjp(y, jnp.asarray(x), params, has_aux=True)
        dx, dparams = vjp(jnp.asarray(dy))
        truth = oracle.batch_norm(x, dy, params["scale"], params["bias"], mask=mask)
        for a, b in [(out, truth.y), (dx, truth.dx), (dparams["scale"], truth.dscale)]:
            assert oracle.error(a, b) <= TOLERANCE
        assert oracle.error(dparams["bias"], truth.dbias) <= TOLERANCE
        assert oracle.error(new["mean"], truth.mean) <= TOLERANCE
        n = np.broadcast_to(mask, x.shape).sum((0, 1))
        assert oracle.error(new["var"], truth.var * n / (n - 1)) <= TOLERANCE
        covered = ~np.broadcast_to(mask, x.shape)
        np.testing.assert_array_equal(dx[covered], 0)
        np.testing.assert_array_equal(out[covered], np.broadcast_to([5, 6, 7], x.shape)[covered])

    def test_evaluation(self, masked):
        mask, x = masked
        params = {"scale": jnp.array([2.0, 3.0, 4.0]), "bias": jnp.array([5.0, 6.0, 7.0])}
        state = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([1.0, 2.0, 3.0])}

        def y(x, params, state):
            return jaxbn.batch_norm(params, state, x, False, mask=mask)[0]

        mean, var = np.asarray(state["mean"]), np.asarray(state["var"])
        x_hat = np.where(mask, (x - mean) / np.sqrt(var + 1e-5), 0)
        wanted = np.asarray(params["scale"]) * x_hat + np.asarray(params["bias"])
        np.testing.assert_allclose(y(x, params, state), wanted, rtol=1e-6, atol=1e-6)
        grads = jax.grad(lambda *a: jnp.sum(y(*a) ** 2), (0, 1, 2))(jnp.asarray(x), params, state)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
        np.testing.assert_array_equal(grads[0][~np.broadcast_to(mask, x.shape)], 0)

    @pytest.mark.parametrize("momentum", [0.9, None])
    @pytest.mark.parametrize(
        ("x", "mask"),
        [
            (np.full((4, 3), np.nan, np.float32), np.zeros((4, 1), bool)),
            (np.zeros((0, 3), np.float32), None),
            (np.zeros((4, 0, 3), np.float32), np.ones((4, 1, 1), bool)),
        ],
        ids=["all masked", "empty", "empty under a mask"],
    )
    def test_no_value_to_count(self, x, mask, momentum):
        params, _ = jaxbn.init(x.shape)
        state = {"mean": jnp.arange(3.0), "var": jnp.arange(3.0), "count": jnp.int32(0)}
        options = {"mask": mask, "momentum": momentum, "running_variance": "biased"}

        def loss(x, params):
            y, new = jaxbn.batch_norm(params, state, x, True, **options)
            return jnp.sum((y - 1) ** 2), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(jnp.asarray(x), params)
        jax.tree.map(np.testing.assert_array_equal, new, state)
        with jax.debug_nans(True):
            jaxbn.batch_norm({}, state, jnp.zeros_like(x), True, **options)
        np.testing.assert_array_equal(y, np.zeros_like(x))
        np.testing.assert_array_equal(grads[0], np.zeros_like(x))
        np.testing.assert_array_equal(grads[1]["scale"], 0)
        assert np.all(np.isfinite(grads[1]["bias"]))

    def test_one_feature_without_values_among_others(self):
        x = normal((6, 3)) + np.array([0, 1e4, 1e4], np.float32)
        mask = np.ones((6, 3), bool)
        mask[:, 1] = False
        params, state = jaxbn.init(x.shape)
        y, new = jaxbn.batch_norm(params, state, x, True, mask=mask)
        np.testing.assert_array_equal(y[:, 1], 0)
        assert new["mean"][1] == 0 and new["var"][1] == 1
        assert oracle.error(y, oracle.batch_norm(x, x, mask=mask).y) <= TOLERANCE

    @pytest.mark.parametrize("batch_variance", ["biased", "unbiased"])
    def test_one_value_that_only_the_mask_knows(self, batch_variance):
        x = np.array([[4.0], [np.nan], [np.nan]], np.float32)
        mask = np.array([[True], [False], [False]])
        state = {"mean": jnp.zeros(1), "var": jnp.full(1, 3.0)}

        def y(x):
            return jaxbn.batch_norm({}, state, x, True, mask=mask, batch_variance=batch_variance)

        out, vjp, new = jax.vjp(y, jnp.asarray(x), has_aux=True)
        np.testing.assert_array_equal(out, 0)
        np.testing.assert_array_equal(vjp(jnp.ones_like(out))[0], 0)
        np.testing.assert_allclose(new["mean"], 0.4, rtol=1e-6)
        np.testing.assert_array_equal(new["var"], 3)
