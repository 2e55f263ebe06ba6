"""`jaxbn.nnx.BatchNorm`: what Flax's layer is, in NNX's own transforms, with its checkpoints."""

import inspect
from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.nnx
from tests import oracle
from tests.test_devices import TOLERANCE as DEVICES_TOLERANCE
from tests.test_devices import WAYS, problem, step

STEPS = 3


def ours(num_features, **options):
    return jaxbn.nnx.BatchNorm(num_features, **options, rngs=nnx.Rngs(0))


def arrays(state):
    return {name: leaf[...] for name, leaf in state.items()}


def params(layer):
    return arrays(nnx.state(layer, nnx.Param))


def stats(layer):
    return arrays(nnx.state(layer, nnx.BatchStat))


def randomize(layer, seed=1):
    """Parameters and statistics that no default would match by chance."""
    rng = np.random.default_rng(seed)
    state = nnx.state(layer)
    for leaf in state.values():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf[...] = jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
    nnx.update(layer, state)
    return layer


def train_step(layer, x, dy, **call):
    """The output, the gradients of parameters and input; the layer's statistics are moved."""
    graphdef, trained, rest = nnx.split(layer, nnx.Param, ...)

    def forward(trained, x):
        merged = nnx.merge(graphdef, trained, rest, copy=True)
        y = merged(x, **call)
        return y, nnx.state(merged, nnx.BatchStat)

    y, vjp, new = jax.vjp(forward, trained, x, has_aux=True)
    nnx.update(layer, new)
    dparams, dx = vjp(dy.astype(y.dtype))
    return y, arrays(dparams), dx


def batches(shape, dtype):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield (
            jnp.asarray(v, dtype) for v in (1 + 2 * rng.normal(size=shape), rng.normal(size=shape))
        )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [v.dtype for v in jax.tree.leaves(a)] == [v.dtype for v in jax.tree.leaves(b)]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, tolerance):
    def close(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()))

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(close, a, b)


class TestAgainstTheFunction:
    @pytest.mark.parametrize("mask", [False, True], ids=["", "masked"])
    @pytest.mark.parametrize(
        ("num_features", "options"),
        [
            (6, {}),
            (6, jaxbn.KERAS),
            (6, jaxbn.EXERCISE),
            (6, {"momentum": None}),
            (6, {"use_bias": False}),
            (6, {"use_scale": False, "use_bias": False}),
            (5, {"axis": 1}),
            # The sizes are in the input's order, whichever order the axes are named in.
            ((5, 6), {"axis": (-1, 1)}),
            ([5, 6], {"axis": [1, 2]}),
        ],
        ids=str,
    )
    def test_steps(self, x64, num_features, options, mask):
        layer = randomize(ours(num_features, **options, param_dtype="float64"))
        ours_params, state = params(layer), stats(layer)
        options = {k: v for k, v in options.items() if not k.startswith("use_")}
        options = {**jaxbn.FLAX, **options}
        call = {"mask": np.random.default_rng(2).random((8, 1, 6)) < 0.7} if mask else {}
        for x, dy in batches((8, 5, 6), "float64"):
            x = jnp.where(call["mask"], x, jnp.nan) if mask else x
            wanted, vjp, state = jax.vjp(
                lambda p, x, s=state: jaxbn.batch_norm(p, s, x, True, **options, **call),
                ours_params,
                x,
                has_aux=True,
            )
            assert_equal(train_step(layer, x, dy, **call), (wanted, *vjp(dy)))
            assert_equal(stats(layer), state)
        x = jnp.linspace(-2, 2, 240).reshape(8, 5, 6)
        wanted, _ = jaxbn.batch_norm(ours_params, state, x, False, **options, **call)
        assert_equal(layer(x, True, **call), wanted)
        assert_equal(stats(layer), state)

    def test_cumulative_average(self):
        layer = ours(3, momentum=None)
        x = jnp.arange(6.0).reshape(2, 3)
        assert layer.count.dtype == jnp.int32
        for k in (1, 2):
            layer(k * x)
        assert layer.count[...] == 2
        np.testing.assert_allclose(layer.mean[...], [2.25, 3.75, 5.25])

    def test_statistics_of_float64_are_kept_in_it(self, x64):
        float64 = {jnp.dtype("float64")}
        layer = ours(3)
        layer(jnp.ones((4, 3), jnp.float64))
        assert {leaf.dtype for leaf in stats(layer).values()} == float64
        layer = ours(3, param_dtype=jnp.float64)
        assert {leaf.dtype for leaf in stats(layer).values()} == float64


class TestAgainstFlax:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"momentum": 0.7, "epsilon": 1e-2},
            {"use_bias": False},
            {"use_scale": False},
            {"use_bias": False, "use_scale": False},
            {"axis": 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 2e-6)])
    def test_steps(self, x64, options, dtype, tolerance):
        theirs = nnx.BatchNorm(6, **options, param_dtype=dtype, rngs=nnx.Rngs(0))
        # Flax begins with float32, and would round once more in the first step.
        nnx.update(theirs, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(theirs)))
        layer = ours(6, **options, param_dtype=dtype)
        for x, dy in batches((4, 6, 6), dtype):
            wanted = train_step(theirs, x, dy)
            assert_close(train_step(layer, x, dy), wanted, tolerance)
            assert_close(stats(layer), stats(theirs), tolerance)
        x = jnp.linspace(-2, 2, 144, dtype=dtype).reshape(4, 6, 6)
        assert_close(layer(x, True), theirs(x, True), tolerance)

    def test_arguments(self):
        """All of Flax's, in its order and with its defaults; ours come after them."""
        flax = inspect.signature(nnx.BatchNorm.__init__).parameters
        here = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
        added = ["batch_variance", "running_variance", "virtual_batch_size"]
        assert [*flax, *added] == list(here)
        for name in flax:
            assert (here[name].default, here[name].kind) == (flax[name].default, flax[name].kind)
        assert {k: here[k].default for k in jaxbn.FLAX} == dict(jaxbn.FLAX)
        call = inspect.signature(nnx.BatchNorm.__call__).parameters
        assert list(inspect.signature(jaxbn.nnx.BatchNorm.__call__).parameters) == list(call)

    def test_initial_values_and_metadata(self):
        normal = nnx.initializers.normal()
        options = {
            "scale_init": normal,
            "bias_init": normal,
            "scale_metadata": {"decay": False},
            "bias_metadata": {"decay": True},
        }
        theirs = nnx.state(nnx.BatchNorm(6, **options, rngs=nnx.Rngs(3)))
        got = nnx.state(jaxbn.nnx.BatchNorm(6, **options, rngs=nnx.Rngs(3)))
        assert jax.tree.structure(got) == jax.tree.structure(theirs)
        assert_equal(arrays(got), arrays(theirs))
        assert not got["scale"].decay and got["bias"].decay


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.inner = nnx.Linear(2, 8, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.norm(self.inner(x))))


class TestCheckpointsOfFlax:
    x = jax.random.normal(jax.random.key(0), (16, 2))

    @pytest.fixture
    def theirs(self):
        theirs = Net(nnx.BatchNorm, nnx.Rngs(0))
        randomize(theirs.norm)
        theirs(self.x)
        theirs.eval()
        return theirs

    def test_update(self, theirs):
        loaded = Net(jaxbn.nnx.BatchNorm, nnx.Rngs(1))
        nnx.update(loaded, nnx.state(theirs))
        loaded.eval()
        np.testing.assert_allclose(loaded(self.x), theirs(self.x), atol=1e-6)

    def test_orbax(self, theirs, tmp_path):
        abstract = nnx.eval_shape(lambda: Net(jaxbn.nnx.BatchNorm, nnx.Rngs(1)))
        graphdef, like = nnx.split(abstract)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "model", nnx.state(theirs))
            checkpointer.wait_until_finished()
            loaded = nnx.merge(graphdef, checkpointer.restore(tmp_path / "model", like))
        loaded.eval()
        np.testing.assert_allclose(loaded(self.x), theirs(self.x), atol=1e-6)
        loaded.train()
        loaded(self.x)
        assert not np.allclose(loaded.norm.mean[...], theirs.norm.mean[...])


class TestMode:
    x = jax.random.normal(jax.random.key(0), (8, 3))

    @pytest.mark.parametrize(
        ("constructed", "method", "call", "running"),
        [
            (False, None, None, False),
            (True, None, None, True),
            (None, None, False, False),
            (None, None, True, True),
            (True, None, False, False),
            (False, None, True, True),
            (True, "train", None, False),
            (False, "eval", None, True),
            (None, "eval", None, True),
            (False, "eval", False, False),
            (True, "train", True, True),
        ],
    )
    def test_precedence(self, constructed, method, call, running):
        layer = randomize(ours(3, use_running_average=constructed))
        if method:
            getattr(layer, method)()
        arguments = (params(layer), stats(layer), self.x, not running)
        wanted, state = jaxbn.batch_norm(*arguments, **jaxbn.FLAX)
        assert_equal(layer(self.x, call), wanted)
        assert_equal(stats(layer), state)

    def test_view_and_clone(self):
        layer = randomize(ours(3))
        view, clone = nnx.view(layer, use_running_average=True), nnx.clone(layer)
        assert (view.use_running_average, layer.use_running_average) == (True, False)
        assert nnx.view(view).use_running_average
        assert "use_running_average: bool | None = None" in nnx.view_info(layer)
        before = stats(layer)
        layer(self.x)
        # A view shares the layer's variables, a clone has its own.
        assert_equal(view(self.x), layer(self.x, True))
        assert_equal(stats(clone), before)

    def test_frozen_while_the_rest_trains(self):
        net = Net(jaxbn.nnx.BatchNorm, nnx.Rngs(0))
        randomize(net.norm)
        net.train()
        net.norm.eval()
        norm, before = params(net.norm), stats(net.norm)
        x = jax.random.normal(jax.random.key(1), (16, 2))
        grad = nnx.jit(nnx.grad(lambda net: jnp.sum(net(x) ** 2)))
        got = grad(net)

        def loss(scale, bias, kernel):
            z = x @ kernel + net.inner.bias[...]
            z = (z - before["mean"]) / jnp.sqrt(before["var"] + 1e-5) * scale + bias
            return jnp.sum(net.outer(nnx.relu(z)) ** 2)

        wanted = jax.grad(loss, (0, 1, 2))(norm["scale"], norm["bias"], net.inner.kernel[...])
        values = got["norm"]["scale"], got["norm"]["bias"], got["inner"]["kernel"]
        values = tuple(v[...] for v in values)
        assert_close(values, wanted, 1e-5)
        assert_equal(stats(net.norm), before)
        net.norm.train()
        assert not np.allclose(grad(net)["inner"]["kernel"][...], wanted[2], rtol=0.1)
        assert not np.allclose(net.norm.mean[...], before["mean"])


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, param_dtype, input_dtype):
    layer = ours(4, momentum=0.0, dtype=dtype, param_dtype=param_dtype)
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (32, 4), input_dtype)
    y = layer(x)
    # As in Flax's layer, the statistics, in float32, take part in the promotion.
    assert y.dtype == jnp.dtype(dtype or "float32")
    truth = oracle.batch_norm(x, y)
    # One rounding to the result's dtype, and to float32 before that.
    assert oracle.error(y, truth.y) <= float(jnp.finfo(y.dtype).eps) / 2 + 5e-7
    assert {leaf.dtype for leaf in stats(layer).values()} == {jnp.dtype("float32")}
    assert oracle.error(layer.mean[...], truth.mean) <= 5e-7


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
    """As many layers as one, with scales of their own."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap
    def make(rngs):
        return jaxbn.nnx.BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs)

    return make(nnx.Rngs(0))


def apart(layers, n):
    graphdef, state = nnx.split(layers)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, k=k: leaf[k], state)) for k in range(n)]


class TestTransforms:
    """Each against the same layer called by hand."""

    x = jax.random.normal(jax.random.key(0), (8, 3))

    def wanted(self, layer, x):
        """Output and statistics of a step, from the function."""
        options = {k: getattr(layer, k) for k in jaxbn.FLAX}
        return jaxbn.batch_norm(params(layer), stats(layer), x, True, **options)

    @pytest.mark.parametrize("lift", [nnx.jit, nnx.remat], ids=["jit", "remat"])
    def test_jit_and_remat(self, lift):
        layer = randomize(ours(3))
        call = lift(lambda layer, x: layer(x))
        for k in range(STEPS):
            wanted = self.wanted(layer, self.x + k)
            assert_close((call(layer, self.x + k), stats(layer)), wanted, 1e-6)
        layer.eval()
        state = stats(layer)
        wanted, _ = jaxbn.batch_norm(params(layer), state, self.x, False)
        assert_close(call(layer, self.x), wanted, 1e-6)
        assert_equal(stats(layer), state)

    def test_jit_with_a_static_definition_of_lists(self):
        x = jnp.ones((2, 3, 4))
        layer = ours([3, 4], axis=[1, 2], axis_name=["data"], axis_index_groups=[[0, 1]])
        graphdef, state = nnx.split(layer)

        @partial(jax.jit, static_argnums=0)
        def call(graphdef, state):
            return nnx.merge(graphdef, state)(x, use_running_average=True)

        np.testing.assert_array_equal(call(graphdef, state), layer(x, use_running_average=True))

    def test_jit_of_jax_takes_and_returns_the_layer(self):
        layer = randomize(ours(3))
        y, new = jax.jit(lambda layer: (layer(self.x), layer))(layer)
        assert_close((y, stats(new)), self.wanted(layer, self.x), 1e-6)

    def test_value_and_grad(self):
        layer = randomize(ours(3))
        initial, state = params(layer), stats(layer)
        loss, grads = nnx.value_and_grad(lambda layer: jnp.sum(layer(self.x) ** 3))(layer)

        def by_hand(params):
            y, new = jaxbn.batch_norm(params, state, self.x, True, **jaxbn.FLAX)
            return jnp.sum(y**3), new

        (wanted, new), dparams = jax.value_and_grad(by_hand, has_aux=True)(initial)
        assert_close((loss, arrays(grads), stats(layer)), (wanted, dparams, new), 1e-6)

    def test_statistics_do_not_leave_a_trace_unseen(self):
        layer = ours(3)
        with pytest.raises(flax.errors.TraceContextError):
            jax.grad(lambda x: layer(x).sum())(self.x)
        jax.grad(lambda x: layer(x, use_running_average=True).sum())(self.x)

    def test_variables_that_are_references(self):
        """Every trace may write to these, that of a gradient too."""
        with nnx.var_defaults(ref=True):
            layer = randomize(ours(3))
        wanted = self.wanted(layer, self.x)
        dx = jax.jit(jax.grad(lambda x: jnp.sum(layer(x) ** 3)))(self.x)
        assert_close(stats(layer), wanted[1], 1e-6)
        assert_close(dx, jax.grad(lambda x: jnp.sum(self.wanted(layer, x)[0] ** 3))(self.x), 1e-5)

    def test_vmap_of_an_ensemble(self):
        layers = stack(2)
        xs = jnp.stack([self.x, 2 * self.x + 1])
        each = apart(layers, 2)
        assert not np.allclose(each[0].scale[...], each[1].scale[...])
        y = nnx.vmap(lambda layer, x: layer(x))(layers, xs)
        for k, one in enumerate(each):
            got = y[k], {name: leaf[k] for name, leaf in stats(layers).items()}
            assert_close(got, self.wanted(one, xs[k]), 1e-6)

    @pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map"])
    def test_axis_name(self, way):
        """One layer for all devices, in and out."""
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
        each = apart(layers, 3)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer(x))

        y, x = forward(layers, self.x), self.x
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
        y = nnx.eval_shape(lambda layer, x: layer(x, use_running_average=True), abstract, self.x)
        assert (y.shape, y.dtype) == ((8, 3), jnp.float32)


def test_a_model_trains():
    # After 150 steps, statistics with Flax's momentum still hold a fifth of their initial values.
    net = Net(partial(jaxbn.nnx.BatchNorm, momentum=0.9), nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(3e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(1), (64, 2)) * 5 + 20
    target = jnp.abs(x - 20).sum(1, keepdims=True)

    def loss(net):
        return jnp.mean((net(x) - target) ** 2)

    @nnx.jit
    def train_step(net, optimizer):
        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    losses = [train_step(net, optimizer) for _ in range(150)]
    assert losses[-1] < losses[0] / 10
    net.eval()
    assert loss(net) < losses[0] / 5


CONSTRUCTION = {
    "negative": (-1, {}, ValueError, "num_features must be the size of the feature axis, or a "
                 "sequence with the size of each, got -1 for axis=-1."),
    "float": (3.0, {}, ValueError, "num_features must be the size of the feature axis, or a "
              "sequence with the size of each, got 3.0 for axis=-1."),
    "sizes": (3, {"axis": (1, 2)}, ValueError, "num_features must be the size of the feature axis, "
              "or a sequence with the size of each, got 3 for axis=(1, 2)."),
    "axis": (3, {"axis": None}, ValueError,
             "axis must be an integer or a sequence of them, got None."),
    "momentum": (3, {"momentum": -1}, ValueError, "momentum must be None or lie in [0, 1], got -1. "
                 "It is the weight of the old value: PyTorch's momentum is one minus it."),
    "epsilon": (3, {"epsilon": -1}, ValueError,
                "epsilon must be a finite number, not negative, got -1."),
    "dtype": (3, {"dtype": jnp.int32}, TypeError, "dtype must be a floating dtype, got int32."),
    "param_dtype": (3, {"param_dtype": jnp.int32}, TypeError,
                    "param_dtype must be a floating dtype, got int32."),
    "batch_variance": (3, {"batch_variance": "fast"}, ValueError,
                       "batch_variance must be 'biased' or 'unbiased', got 'fast'."),
    "running_variance": (3, {"running_variance": None}, ValueError,
                         "running_variance must be 'biased' or 'unbiased', got None."),
    "groups": (3, {"axis_index_groups": [[0, 1]]}, ValueError, "axis_index_groups=[[0, 1]] are "
               "groups of an axis: axis_name must name it, got None."),
    "mode": (3, {"use_running_average": 1}, ValueError,
             "use_running_average must be a Python bool, got 1 of type int."),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_errors_of_construction(case):
    num_features, options, kind, text = CONSTRUCTION[case]
    with pytest.raises(kind) as raised:
        ours(num_features, **options)
    assert str(raised.value) == text


CALL = {
    "features": ({}, (8, 4), ValueError, "x of shape (8, 4) has (4,) features on axis=-1, where "
                 "the layer was made for num_features=3."),
    "axis": ({"axis": 2}, (8, 3), ValueError, "axis=2 is out of range for the shape (8, 3): an "
             "axis must lie in [-2, 1]."),
    "one value": (jaxbn.PYTORCH, (1, 3), ValueError, "x of shape (1, 3) has one value per feature "
                  "(axis 1), which has no unbiased variance; give more values, or "
                  "batch_variance='biased' and running_variance='biased'."),
    "axis_name": ({"axis_name": "data"}, (8, 3), ValueError, "axis_name='data' is not bound: call "
                  "batch_norm inside a vmap, pmap or shard_map that names it, or pass "
                  "axis_name=None."),
    "mode": ({"use_running_average": None}, (8, 3), ValueError, "use_running_average must be True "
             "(evaluation) or False (training), got None: give it to BatchNorm or to the call, or "
             "set it with train(), eval() or nnx.view."),
}  # fmt: skip


@pytest.mark.parametrize("case", CALL)
def test_errors_of_a_call(case):
    options, shape, kind, text = CALL[case]
    layer = ours(3, **options)
    before = stats(layer)
    with pytest.raises(kind) as raised:
        layer(jnp.ones(shape))
    assert str(raised.value) == text
    assert_equal(stats(layer), before)


def test_errors_of_wrong_kinds_at_call():
    layer = ours(3)
    with pytest.raises(TypeError, match=r"^x must be of a floating dtype, got complex64; convert "):
        layer(jnp.ones((8, 3), jnp.complex64))
    with pytest.raises(TypeError, match=r"^mask must be an array of booleans, got complex64\.$"):
        layer(jnp.ones((8, 3)), mask=jnp.ones((8, 3), jnp.complex64))
    with pytest.raises(ValueError, match=r"^use_running_average must be a Python bool, got a trac"):
        jax.jit(layer)(jnp.ones((8, 3)), True)
