"""`jaxbn.linen.BatchNorm` in the transforms of JAX and Flax, against the same layers by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen

ours = jaxbn.linen.BatchNorm


def test_axis_name_sums_over_it():
    x = jax.random.normal(jax.random.key(0), (4, 8, 3))
    layer = ours(use_running_average=False, axis_name="batch")
    variables = layer.init(jax.random.key(0), x[0])
    y, updates = jax.vmap(
        lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="batch"
    )(x)
    whole = ours(use_running_average=False)
    wanted, wanted_updates = whole.apply(variables, x.reshape(32, 3), mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(32, 3), wanted, atol=1e-6)
    for key, leaf in updates["batch_stats"].items():
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        np.testing.assert_allclose(leaf[0], wanted_updates["batch_stats"][key], rtol=1e-6)


class TestLiftedTransforms:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    @pytest.mark.parametrize("lift", [nn.jit, nn.remat], ids=["jit", "remat"])
    def test_jit_and_remat(self, lift):
        plain = ours(use_running_average=False)
        lifted = lift(ours)(use_running_average=False)
        variables = plain.init(jax.random.key(0), self.x)

        def loss(params, layer):
            y, updates = layer.apply(
                {**variables, "params": params}, self.x, mutable=["batch_stats"]
            )
            return jnp.sum(y**3), updates

        results = [
            jax.grad(loss, has_aux=True)(variables["params"], layer) for layer in (plain, lifted)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)

    def test_vmap(self):
        xs = np.stack([self.x, 2 * self.x + 1])
        many = nn.vmap(
            ours, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
        )
        layer = many(use_running_average=False)
        variables = layer.init(jax.random.key(0), xs)
        y, updates = layer.apply(variables, xs, mutable=["batch_stats"])
        for k, x in enumerate(xs):
            one = jax.tree.map(lambda leaf, k=k: leaf[k], variables)
            wanted = ours(use_running_average=False).apply(one, x, mutable=["batch_stats"])
            got = y[k], jax.tree.map(lambda leaf, k=k: leaf[k], updates)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)

    def test_vmap_that_shares_statistics(self):
        xs = np.stack([self.x, 2 * self.x + 1])
        shared = nn.vmap(
            ours,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="batch",
        )
        layer = shared(use_running_average=False, axis_name="batch")
        variables = layer.init(jax.random.key(0), xs)
        y, _ = layer.apply(variables, xs, mutable=["batch_stats"])
        np.testing.assert_allclose(np.mean(y, (0, 1)), 0, atol=1e-6)
        np.testing.assert_allclose(np.std(y, (0, 1)), 1, atol=1e-4)

    def test_scan(self):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(ours(use_running_average=False)(nn.Dense(3)(x))), None

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                scanned = nn.scan(
                    Block,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                return scanned()(x, None)[0]

        variables = Stack().init(jax.random.key(0), self.x)
        y, updates = Stack().apply(variables, self.x, mutable=["batch_stats"])
        (name,) = variables["params"]
        x = self.x
        for k in range(3):
            one = {
                c: jax.tree.map(lambda leaf, k=k: leaf[k], variables[c][name]) for c in variables
            }
            (x, _), update = Block().apply(one, x, None, mutable=["batch_stats"])
            got = jax.tree.map(lambda leaf, k=k: leaf[k], updates["batch_stats"][name])
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, update["batch_stats"]
            )
        np.testing.assert_allclose(y, x, atol=1e-5)
