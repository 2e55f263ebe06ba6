"""`jaxbn.nnx.BatchNorm` in the transforms of NNX and JAX, and on several devices."""

from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.nnx
from tests import close
from tests.close import assert_equal
from tests.devices import TOLERANCE as DEVICES_TOLERANCE
from tests.devices import WAYS, problem, step
from tests.nnx_layers import STEPS, X, arrays, ours, params, randomize, stats

assert_close = partial(close.assert_close, of_largest=True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
def test_n_devices_equal_one(way):
    def layer(x, params, state, mask=None, **options):
        layer = ours(x.shape[-1], **{**jaxbn.PYTORCH, **options})
        variables = {k: nnx.Param(v) for k, v in params.items()}
        nnx.update(layer, nnx.State(variables | {k: nnx.BatchStat(v) for k, v in state.items()}))
        return layer(x, mask=mask), stats(layer)

    batch, initial, state = problem("unequal")
    *wanted, wanted_state = step(*batch, initial, state)
    *got, states = WAYS[way](batch, initial, state, layer)
    assert_all = partial(np.testing.assert_allclose, rtol=0, atol=DEVICES_TOLERANCE)
    jax.tree.map(assert_all, got, wanted)
    for key, each in states.items():
        each = np.asarray(each).reshape(8, -1)
        assert_all(each, np.broadcast_to(wanted_state[key], each.shape))


def stack(n):
    """Return `n` layers with different scales, stacked into one."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap
    def make(rngs):
        return jaxbn.nnx.BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs)

    return make(nnx.Rngs(0))


def unstacked(layers, n):
    graphdef, state = nnx.split(layers)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state)) for k in range(n)]


class TestTransforms:
    """Each transform is compared with the function."""

    def wanted(self, layer, x):
        """Return output and statistics of a step of the function."""
        options = {k: getattr(layer, k) for k in jaxbn.FLAX}
        return jaxbn.batch_norm(params(layer), stats(layer), x, True, **options)

    @pytest.mark.parametrize("lift", [nnx.jit, nnx.remat], ids=["jit", "remat"])
    def test_jit_and_remat(self, lift):
        layer = randomize(ours(3))
        call = lift(lambda layer, x: layer(x))
        for k in range(STEPS):
            wanted = self.wanted(layer, X + k)
            assert_close((call(layer, X + k), stats(layer)), wanted, 1e-6)
        layer.eval()
        state = stats(layer)
        wanted, _ = jaxbn.batch_norm(params(layer), state, X, False)
        assert_close(call(layer, X), wanted, 1e-6)
        assert_equal(stats(layer), state)

    def test_jit_with_a_static_definition_of_lists(self):
        x = jnp.ones((2, 3, 4))
        layer = ours([3, 4], axis=[1, 2], axis_name=["data"], axis_index_groups=[[0, 1]])
        graphdef, state = nnx.split(layer)

        @partial(jax.jit, static_argnums=0)
        def call(graphdef, state):
            return nnx.merge(graphdef, state)(x, use_running_average=True)

        wanted = nnx.jit(lambda layer: layer(x, use_running_average=True))(layer)
        np.testing.assert_array_equal(call(graphdef, state), wanted)

    def test_jit_of_jax_takes_and_returns_the_layer(self):
        layer = randomize(ours(3))
        y, new = jax.jit(lambda layer: (layer(X), layer))(layer)
        assert_close((y, stats(new)), self.wanted(layer, X), 1e-6)

    def test_value_and_grad(self):
        layer = randomize(ours(3))
        initial, state = params(layer), stats(layer)
        loss, grads = nnx.value_and_grad(lambda layer: jnp.sum(layer(X) ** 3))(layer)

        def by_hand(params):
            y, new = jaxbn.batch_norm(params, state, X, True, **jaxbn.FLAX)
            return jnp.sum(y**3), new

        (wanted, new), dparams = jax.value_and_grad(by_hand, has_aux=True)(initial)
        assert_close((loss, arrays(grads), stats(layer)), (wanted, dparams, new), 1e-6)

    def test_statistics_do_not_leave_a_trace_unseen(self):
        layer = ours(3)
        with pytest.raises(flax.errors.TraceContextError):
            jax.grad(lambda x: layer(x).sum())(X)
        jax.grad(lambda x: layer(x, use_running_average=True).sum())(X)

    def test_variables_that_are_references(self):
        """Every trace may write to such variables, even that of a gradient."""
        with nnx.var_defaults(ref=True):
            layer = randomize(ours(3))
        wanted = self.wanted(layer, X)
        dx = jax.jit(jax.grad(lambda x: jnp.sum(layer(x) ** 3)))(X)
        assert_close(stats(layer), wanted[1], 1e-6)
        assert_close(dx, jax.grad(lambda x: jnp.sum(self.wanted(layer, x)[0] ** 3))(X), 1e-5)

    def test_vmap_of_an_ensemble(self):
        layers = stack(2)
        xs = jnp.stack([X, 2 * X + 1])
        each = unstacked(layers, 2)
        assert not np.allclose(each[0].scale[...], each[1].scale[...])
        y = nnx.vmap(lambda layer, x: layer(x))(layers, xs)
        for k, one in enumerate(each):
            got = y[k], {name: leaf[k] for name, leaf in stats(layers).items()}
            assert_close(got, self.wanted(one, xs[k]), 1e-6)

    @pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map"])
    def test_axis_name(self, way):
        """All devices share one layer, before and after the call."""
        layer = randomize(ours(3, axis_name="data"))
        x = 3 + jax.random.normal(jax.random.key(1), (8, 4, 3))
        wanted = self.wanted(layer, x.reshape(32, 3))
        if way == "shard_map":
            mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
            call = nnx.shard_map(lambda layer, x: layer(x), mesh=mesh, **specs)
        else:
            map_ = getattr(nnx, way)
            call = map_(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="data")
        y = call(layer, x)
        assert_close((y.reshape(32, 3), stats(layer)), wanted, 1e-6)

    def test_scan_over_layers(self):
        layers = stack(3)
        each = unstacked(layers, 3)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer(x))

        y, x = forward(layers, X), X
        for k, one in enumerate(each):
            x, new = self.wanted(one, x)
            x = nnx.relu(x)
            assert_close({name: leaf[k] for name, leaf in stats(layers).items()}, new, 1e-5)
        assert_close(y, x, 1e-5)

    def test_scan_over_batches(self):
        layer = randomize(ours(3, momentum=None))
        xs = jax.random.normal(jax.random.key(1), (4, 8, 3))

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def steps(layer, x):
            return layer, layer(x)

        one = nnx.clone(layer)
        _, ys = steps(layer, xs)
        assert_close(ys, jnp.stack([one(x) for x in xs]), 1e-6)
        assert_close(stats(layer), stats(one), 1e-6)

    def test_eval_shape(self):
        abstract = nnx.eval_shape(lambda: ours(3, axis_name="data"))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
        y = nnx.eval_shape(lambda layer, x: layer(x, use_running_average=True), abstract, X)
        assert (y.shape, y.dtype) == ((8, 3), jnp.float32)
