"""`jaxbn.nnx.BatchNorm` equals Flax's layer, and loads its checkpoints."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from tests import close, oracle
from tests.close import assert_equal
from tests.nnx_layers import X, arrays, batches, ours, params, randomize, stats, train_step

assert_close = partial(close.assert_close, of_largest=True)


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
        # The cumulative average needs a mask that is the same for all features.
        shape = (8, 1, 1 if options["momentum"] is None else 6)
        call = {"mask": np.random.default_rng(2).random(shape) < 0.7} if mask else {}
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

    @pytest.mark.usefixtures("x64", "standard_promotion")
    def test_statistics_of_float64_are_kept_in_it(self):
        float64 = {jnp.dtype("float64")}
        layer = ours(3)
        layer(jnp.ones((4, 3), jnp.float64))
        assert {leaf.dtype for leaf in stats(layer).values()} == float64
        layer = ours(3, param_dtype=jnp.float64)
        assert {leaf.dtype for leaf in stats(layer).values()} == float64


class TestAgainstFlax:
    @pytest.mark.usefixtures("x64", "standard_promotion")
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
    def test_steps(self, options, dtype, tolerance):
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
        """All arguments of Flax, in its order and with its defaults, precede ours."""
        flax = inspect.signature(nnx.BatchNorm.__init__).parameters
        here = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
        added = ["batch_variance", "running_variance", "virtual_batch_size", "frozen", "track"]
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
        arguments = (params(layer), stats(layer), X, not running)
        wanted, state = jaxbn.batch_norm(*arguments, **jaxbn.FLAX)
        assert_equal(layer(X, call), wanted)
        assert_equal(stats(layer), state)

    def test_view_and_clone(self):
        layer = randomize(ours(3))
        view, clone = nnx.view(layer, use_running_average=True), nnx.clone(layer)
        assert (view.use_running_average, layer.use_running_average) == (True, False)
        assert nnx.view(view).use_running_average
        assert "use_running_average: bool | None = None" in nnx.view_info(layer)
        before = stats(layer)
        layer(X)
        # A view shares the layer's variables, a clone has its own.
        assert_equal(view(X), layer(X, True))
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
            z = x @ kernel + net.inner.bias[None]
            mean, var = before["mean"][None], before["var"][None]
            z = (z - mean) / jnp.sqrt(var + 1e-5) * scale[None] + bias[None]
            return jnp.sum(net.outer(nnx.relu(z)) ** 2)

        wanted = jax.grad(loss, (0, 1, 2))(norm["scale"], norm["bias"], net.inner.kernel[...])
        values = got["norm"]["scale"], got["norm"]["bias"], got["inner"]["kernel"]
        values = tuple(v[...] for v in values)
        assert_close(values, wanted, 1e-5)
        assert_equal(stats(net.norm), before)
        net.norm.train()
        assert not np.allclose(grad(net)["inner"]["kernel"][...], wanted[2], rtol=0.1)
        assert not np.allclose(net.norm.mean[...], before["mean"])


@pytest.mark.usefixtures("standard_promotion")
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float16", "float32"])
def test_a_given_dtype_needs_no_promotion(dtype, input_dtype):
    """Tests run under strict promotion, where Flax's own layer raises for these dtypes."""
    layer = ours(4, dtype=dtype)
    assert layer(jnp.ones((8, 4), input_dtype)).dtype == dtype


# Optax promotes the count of its steps.
@pytest.mark.usefixtures("standard_promotion")
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
