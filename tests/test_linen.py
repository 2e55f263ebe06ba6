"""`jaxbn.linen.BatchNorm` equals Flax's layer, and loads its checkpoints."""

import inspect
import math
from typing import Any

import flax.errors
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from tests.close import assert_close

ours = jaxbn.linen.BatchNorm
STEPS = 3

# Both compute the same formulas on inputs with a mean of a deviation or less.
TOLERANCE = {"float32": 2e-6, "float64": 1e-11}


def batches(shape, dtype):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        x, dy = (1 + 2 * rng.normal(size=shape), rng.normal(size=shape))
        yield jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


def steps(layer, shape, dtype, **call):
    """Return variables, outputs and gradients of training steps and an evaluation."""

    @jax.jit
    def step(variables, x, dy):
        def y(params, x):
            variables_with = {**variables, "params": params}
            return layer.apply(variables_with, x, False, mutable=["batch_stats"], **call)

        out, vjp, updates = jax.vjp(y, variables.get("params", {}), x, has_aux=True)
        return out, vjp(dy.astype(out.dtype)), updates

    variables = layer.init(jax.random.key(0), jnp.ones(shape, dtype), False)
    if dtype == "float64":
        # A state in float32 would be rounded by Flax once more in the first step.
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    results = [variables]
    for x, dy in batches(shape, dtype):
        results.append(step(variables, x, dy))
        variables = {**variables, **results[-1][-1]}
    x = jnp.linspace(-2, 2, math.prod(shape), dtype=dtype).reshape(shape)
    return [*results, jax.jit(lambda x: layer.apply(variables, x, True))(x)]


OPTIONS = {
    "defaults": {},
    "momentum and epsilon": {"momentum": 0.7, "epsilon": 1e-2},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "neither": {"use_bias": False, "use_scale": False},
    "axis 1": {"axis": 1},
    "axes": {"axis": (0, -1)},
    "initializers": {
        "scale_init": nn.initializers.normal(),
        "bias_init": nn.initializers.constant(2.0),
    },
}


class TestAgainstFlax:
    @pytest.mark.usefixtures("x64", "standard_promotion")
    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [
            ("float64", (8, 6)),
            ("float64", (4, 5, 6)),
            ("float64", (2, 3, 5, 6)),
            ("float32", (2, 3, 5, 6)),
        ],
        ids=str,
    )
    def test_options_and_shapes(self, dtype, options, shape):
        options = OPTIONS[options]
        wanted = steps(nn.BatchNorm(**options), shape, dtype)
        got = steps(ours(**options), shape, dtype)
        assert_close(got, wanted, TOLERANCE[dtype], of_largest=True)

    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_dtypes(self, dtype, param_dtype, input_dtype):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        wanted = steps(nn.BatchNorm(**options), (8, 6), input_dtype)
        got = steps(ours(**options), (8, 6), input_dtype)
        # Two roundings of the coarsest type there is: eight bits in bfloat16.
        coarsest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(wanted))
        assert_close(got, wanted, 2 * coarsest, of_largest=True)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("input_dtype", ["bfloat16", "float16", "float32"])
    def test_a_given_dtype_needs_no_promotion(self, dtype, input_dtype):
        """Tests run under strict promotion, where Flax's own layer raises for these dtypes."""
        y, _ = ours(dtype=dtype).init_with_output(
            jax.random.key(0), jnp.ones((8, 6), input_dtype), False
        )
        assert y.dtype == dtype

    def test_mask_where_it_counts(self):
        mask = np.random.default_rng(1).random((8, 1)) < 0.6
        wanted = steps(nn.BatchNorm(), (8, 6), jnp.float32, mask=mask)
        got = steps(ours(), (8, 6), jnp.float32, mask=mask)
        for key in ("mean", "var"):
            np.testing.assert_allclose(
                got[-2][-1]["batch_stats"][key], wanted[-2][-1]["batch_stats"][key], rtol=1e-6
            )
        rows = np.broadcast_to(mask, (8, 6))
        np.testing.assert_allclose(got[1][0][rows], wanted[1][0][rows], rtol=1e-5, atol=1e-5)

    def test_arguments(self):
        """All arguments of Flax, in its order and with its defaults, precede ours."""
        flax = inspect.signature(nn.BatchNorm).parameters
        here = inspect.signature(ours).parameters
        added = ["batch_variance", "running_variance", "virtual_batch_size", "frozen", "track"]
        of_modules = ["parent", "name"]
        assert list(here) == [k for k in flax if k not in of_modules] + added + of_modules
        for name in flax:
            assert (here[name].default, here[name].kind) == (flax[name].default, flax[name].kind)
        assert {k: here[k].default for k in jaxbn.FLAX} == dict(jaxbn.FLAX)
        call = inspect.signature(nn.BatchNorm.__call__).parameters
        assert list(inspect.signature(ours.__call__).parameters) == list(call)


class Net(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        for features in (8, 4):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = self.norm(use_running_average=not train, name=f"BatchNorm_{features}")(x)
            x = nn.relu(x)
        return nn.Dense(3)(x.mean((1, 2)))


def test_a_checkpoint_of_a_flax_model_loads():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    flax_net, our_net = Net(nn.BatchNorm), Net(ours)
    variables = flax_net.init(jax.random.key(1), x, True)
    _, updates = flax_net.apply(variables, x, True, mutable=["batch_stats"])
    saved = flax.serialization.to_bytes({**variables, **updates})
    loaded = flax.serialization.from_bytes(our_net.init(jax.random.key(2), x, True), saved)
    np.testing.assert_allclose(
        our_net.apply(loaded, x, False),
        flax_net.apply({**variables, **updates}, x, False),
        atol=1e-6,
    )


def test_variables_go_straight_into_the_function():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    layer = ours(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    got = layer.apply(variables, x, mutable=["batch_stats"])
    arguments = (variables["params"], variables["batch_stats"], x, True)
    wanted = jaxbn.batch_norm(*arguments, **jaxbn.FLAX)
    jax.tree.map(np.testing.assert_array_equal, got, (wanted[0], {"batch_stats": wanted[1]}))


class TestInitialization:
    def test_is_no_training_step(self):
        x = 5 + jax.random.normal(jax.random.key(0), (8, 3))
        y, variables = ours(use_running_average=False).init_with_output(jax.random.key(0), x)
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
        np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)
        np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)

    def test_needs_no_axis_name(self):
        layer = ours(use_running_average=False, axis_name="batch", axis_index_groups=[[0, 1]])
        layer.init(jax.random.key(0), jnp.ones((8, 3)))

    def test_takes_one_example(self):
        layer = ours(use_running_average=False, **jaxbn.PYTORCH)
        layer.init(jax.random.key(0), jnp.ones((1, 3)))

    def test_of_the_cumulative_average(self):
        layer = ours(use_running_average=False, momentum=None)
        x = jnp.arange(6.0).reshape(2, 3)
        variables = layer.init(jax.random.key(0), x)
        assert variables["batch_stats"]["count"] == 0
        for k in (1, 2):
            _, updates = layer.apply(variables, k * x, mutable=["batch_stats"])
            variables = {**variables, **updates}
        assert variables["batch_stats"]["count"] == 2
        np.testing.assert_allclose(variables["batch_stats"]["mean"], [2.25, 3.75, 5.25])


def test_use_running_average_is_given_once():
    x = jnp.ones((8, 3))
    variables = ours().init(jax.random.key(0), x, True)
    for layer, arguments in [(ours(), ()), (ours(use_running_average=True), (True,))]:
        with pytest.raises(ValueError, match="use_running_average"):
            layer.apply(variables, x, *arguments)


def test_batch_stats_must_be_mutable_in_training():
    x = jnp.ones((8, 3))
    variables = ours().init(jax.random.key(0), x, True)
    with pytest.raises(flax.errors.ModifyScopeVariableError) as raised:
        ours().apply(variables, x, False)
    assert raised.value.__notes__[0] == (
        "In training, BatchNorm updates its running statistics: call `y, updates = "
        "model.apply(variables, x, ..., mutable=['batch_stats'])`, or pass "
        "use_running_average=True to use them unchanged. With track=False they are not updated."
    )


def test_export_for_any_batch_size():
    layer = jaxbn.linen.BatchNorm(use_running_average=True)
    x = jax.random.normal(jax.random.key(0), (7, 3))
    variables = layer.init(jax.random.key(1), x)
    (size,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(layer.apply))(
        variables, jax.ShapeDtypeStruct((size, 3), jnp.float32)
    )
    wanted = jax.jit(layer.apply)(variables, x)
    np.testing.assert_array_equal(exported.call(variables, x), wanted)


def test_frozen_while_the_rest_trains():
    """In training with running statistics, they stay, and gradients are those of evaluation."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="dense")(x)
            return jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(x)

    x = jax.random.normal(jax.random.key(0), (16, 2))
    variables = Net().init(jax.random.key(1), x)
    stats = {"mean": jnp.array([1.0, -1, 0]), "var": jnp.array([2.0, 0.5, 1])}

    def loss(params):
        variables = {"params": params, "batch_stats": {"norm": stats}}
        y, updates = Net().apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), updates["batch_stats"]["norm"]

    def by_hand(params):
        z: Any = nn.Dense(3).apply({"params": params["dense"]}, x)
        mean, var, scale, bias = (
            v[None] for v in (*stats.values(), params["norm"]["scale"], params["norm"]["bias"])
        )
        return jnp.sum(jnp.sin(scale * ((z - mean) / jnp.sqrt(var + 1e-5)) + bias))

    gradients, after = jax.grad(loss, has_aux=True)(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    jax.tree.map(
        # Sums of 16 terms of order one, each with some roundings.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        *(gradients, jax.grad(by_hand)(variables["params"])),
    )
