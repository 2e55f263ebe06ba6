"""A Linen model changes one import: the same arguments, numbers and dtypes as Flax's layer has."""

from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import flax.linen.summary
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen

ours, theirs = jaxbn.linen.BatchNorm, nn.BatchNorm
KEY = jax.random.key(0)
# Values of order one and sums of a few dozen of them: each layer is within some roundings of the
# exact result, and E[x²] - E[x]² loses another digit or two.
TOLERANCE = 1e-5

X = np.random.default_rng(0).normal(1, 2, (8, 6)).astype(np.float32)


def trained(layer, x, **call):
    """The output and the variables after initialization, two steps, and in evaluation."""
    initial, variables = layer.init_with_output(KEY, x, False, **call)
    results = [initial, variables]
    for k in range(2):
        y, updates = layer.apply(variables, x + k, False, mutable=["batch_stats"], **call)
        variables = {**variables, **updates}
        results += [y, variables]
    return [*results, layer.apply(variables, x, True, **call)]


def assert_close(got, wanted, tolerance=TOLERANCE):
    def close(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(close, got, wanted)


def test_a_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(trained(ours(momentum=0.9), X), trained(theirs(), X))


class TestArguments:
    def test_positional(self):
        """Flax's fourteen, in its order."""
        arguments = (
            *(None, 0, 0.7, 1e-3, jnp.bfloat16, jnp.float32, True, False),
            *(nn.initializers.constant(0.5), nn.initializers.ones, "data", None, False, False),
        )

        def run(layer):
            return jax.vmap(partial(trained, layer(*arguments)), axis_name="data")(
                X.reshape(2, 4, 6)
            )

        # Two roundings to eight bits, of values up to three.
        assert_close(run(ours), run(theirs), 3 * 2.0**-7)

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("wide", [True, False])
    def test_options_without_effect(self, fast, wide):
        options = {"use_fast_variance": fast, "force_float32_reductions": wide}
        got = trained(ours(**options), X)
        jax.tree.map(np.testing.assert_array_equal, got, trained(ours(), X))
        assert_close(got, trained(theirs(**options), X))

    def test_a_batch_of_one_row_trains(self):
        assert_close(trained(ours(), X[:1]), trained(theirs(), X[:1]))

    @pytest.mark.parametrize("axis", [(0, 1), (1, -1), [1]], ids=str)
    def test_several_feature_axes(self, axis):
        x = X.reshape(4, 2, 6)
        assert_close(trained(ours(axis=axis), x), trained(theirs(axis=axis), x))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("of_input", ["bool", "uint8", "int32", "float16"])
def test_dtypes(of_input, dtype, param_dtype):
    x = (X > 1).astype(of_input) if of_input == "bool" else np.abs(4 * X).astype(of_input)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    got, wanted = trained(ours(**options), x), trained(theirs(**options), x)
    # Two roundings to the output's dtype, of values up to three; the rest are in float32.
    assert_close(got, wanted, max(TOLERANCE, 3 * float(jnp.finfo(got[0].dtype).eps)))


@pytest.mark.usefixtures("x64")
def test_a_wide_dtype_widens_the_computation():
    x = np.float32(1e4) + X
    got, wanted = (trained(layer(dtype="float64"), x) for layer in (ours, theirs))
    # The squares of 1e4 cost float64 eight of its sixteen digits.
    assert_close(got, wanted, 1e-7)


class TestMasks:
    mask = np.random.default_rng(1).random((8, 1)) < 0.6

    def test_where_it_counts(self):
        """Statistics and outputs are Flax's; elsewhere the input is NaN, and the output is bias."""
        x = np.where(self.mask, X, np.nan)
        got, wanted = (trained(layer(), x, mask=self.mask) for layer in (ours, theirs))

        def counted(results):
            return [r[self.mask[:, 0]] if isinstance(r, jax.Array) else r for r in results]

        assert_close(counted(got), counted(wanted))
        for y in got[::2]:
            np.testing.assert_array_equal(np.asarray(y)[~self.mask[:, 0]], 0)

    @pytest.mark.parametrize("kind", ["int32", "uint8", "float32", "bfloat16", list])
    def test_of_numbers(self, kind):
        mask = self.mask.astype(int).tolist() if kind is list else jnp.asarray(self.mask, kind)
        got, wanted = (trained(ours(), X, mask=m) for m in (mask, self.mask))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        flax = trained(theirs(), X, mask=mask)
        assert_close(got[-2], flax[-2])

    def test_that_are_neither(self):
        with pytest.raises(TypeError) as raised:
            trained(ours(), X, mask=jnp.ones((8, 1), jnp.complex64))
        assert str(raised.value) == "mask must be an array of booleans, got complex64."

    def test_function_keeps_refusing_numbers(self):
        params, state = jaxbn.init(X.shape)
        with pytest.raises(TypeError, match=r"^mask must be an array of booleans, got int32"):
            jaxbn.batch_norm(params, state, X, True, mask=jnp.ones((8, 1), jnp.int32))
        with pytest.raises(TypeError, match=r"^x must be of a floating dtype, got int32"):
            jaxbn.batch_norm(params, state, jnp.ones((8, 6), jnp.int32), True)


class Twice(nn.Module):
    """One layer called twice, over an axis that does not exist in initialization."""

    norm: Any

    @nn.compact
    def __call__(self, x):
        norm = self.norm(name="norm", use_running_average=False, axis_name="batch")
        return norm(x), norm(norm(x) ** 2)


def test_called_twice_and_initialized_without_its_axis():
    got, wanted = (Twice(norm).init_with_output(KEY, X) for norm in (ours, theirs))
    assert_close(got, wanted)

    def step(norm):
        apply = partial(Twice(norm).apply, wanted[1], mutable=["batch_stats"])
        return jax.vmap(apply, axis_name="batch")(X.reshape(2, 4, 6))

    assert_close(step(ours), step(theirs))


@pytest.mark.parametrize("groups", [None, [[0, 2], [1, 3]]], ids=["all", "groups"])
def test_pmap(groups):
    x = X.reshape(4, 2, 6)

    def step(norm):
        layer = norm(axis_name="batch", axis_index_groups=groups, use_running_average=False)
        variables = layer.init(KEY, x[0])
        apply = partial(layer.apply, variables, mutable=["batch_stats"])
        return jax.pmap(apply, axis_name="batch")(x)

    assert_close(jax.device_get(step(ours)), jax.device_get(step(theirs)))


class Block(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return nn.tanh(self.norm(use_running_average=False)(nn.Dense(x.shape[-1])(x)))


class BlockWithCarry(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(self.norm(use_running_average=False)(nn.Dense(x.shape[-1])(x))), None


EACH = {"params": 0, "batch_stats": 0}
LIFTED = {
    "jit": lambda norm: nn.jit(Block)(norm),
    "remat": lambda norm: nn.remat(Block)(norm),
    "vmap": lambda norm: nn.vmap(Block, variable_axes=EACH, split_rngs={"params": True})(norm),
    "vmap, shared": lambda norm: nn.vmap(
        Block,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="batch",
    )(partial(norm, axis_name="batch")),
    "scan": lambda norm: nn.scan(
        BlockWithCarry, variable_axes=EACH, split_rngs={"params": True}, length=3
    )(norm),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_lifted_transforms(lift):
    x = X.reshape(2, 4, 6)
    arguments = (x, None) if lift == "scan" else (x,)
    # Flax's variables for both.
    variables = LIFTED[lift](theirs).init(KEY, *arguments)

    def results(norm):
        def loss(params, x):
            out, updates = LIFTED[lift](norm).apply(
                {**variables, "params": params}, x, *arguments[1:], mutable=["batch_stats"]
            )
            return sum(jnp.sum(y**3) for y in jax.tree.leaves(out)), updates

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    # A loss, and gradients that are sums of 48 terms of up to ten, through up to three layers.
    assert_close(results(ours), results(theirs), 2e-4)


def test_bound_modules():
    class Net(nn.Module):
        norm: Any

        def setup(self):
            self.first, self.bn = nn.Dense(3), self.norm()

    def forward(net, x):
        return net.bn(net.first(x), use_running_average=False)

    def run(norm):
        net = Net(norm)
        y, variables = nn.init_with_output(forward, net)(KEY, X)
        bound = net.bind(variables, mutable=["batch_stats"])
        return y, forward(bound, X), bound.variables["batch_stats"]

    assert_close(run(ours), run(theirs))


def test_tabulate():
    wide = {"width": 200}
    tables = [
        flax.linen.summary.tabulate(Block(norm), KEY, console_kwargs=wide)(X)
        for norm in (ours, theirs)
    ]
    assert "BatchNorm_0" in tables[0] and tables[0] == tables[1]


class TestCumulativeAverage:
    def test_over_statistics_without_count(self):
        """Trained statistics are not replaced by those of the first batch."""
        layer = ours(momentum=None)
        variables = ours().init(KEY, X, False)
        with pytest.raises(ValueError) as raised:
            layer.apply(variables, X, False, mutable=["batch_stats"])
        assert str(raised.value) == (
            "momentum=None, the cumulative average, needs the number of batches so far: state must "
            "have 'count', as init(..., track_count=True) makes it."
        )
        # Evaluation needs no count, and adds none.
        y, updates = layer.apply(variables, X, True, mutable=["batch_stats"])
        np.testing.assert_array_equal(y, ours().apply(variables, X, True))
        assert set(updates["batch_stats"]) == {"mean", "var"}

    def test_from_the_start(self):
        *_, variables, _ = trained(ours(momentum=None), X)
        assert variables["batch_stats"]["count"] == 2
        # The mean of X and X + 1.
        np.testing.assert_allclose(variables["batch_stats"]["mean"], X.mean(0) + 0.5, rtol=1e-5)

    def test_immutable_statistics(self):
        layer = ours(momentum=None)
        with pytest.raises(flax.errors.ModifyScopeVariableError) as raised:
            layer.apply(layer.init(KEY, X, False), X, False)
        assert "mutable=['batch_stats']" in raised.value.__notes__[0]


MOMENTUM = "It is the weight of the old value: PyTorch's momentum is one minus it."
OPTIONS = {
    "momentum": ({"momentum": 2}, ValueError,
                 f"momentum must be None or lie in [0, 1], got 2. {MOMENTUM}"),
    "epsilon": ({"epsilon": -1}, ValueError,
                "epsilon must be a finite number, not negative, got -1."),
    "batch_variance": ({"batch_variance": "fast"}, ValueError,
                       "batch_variance must be 'biased' or 'unbiased', got 'fast'."),
    "running_variance": ({"running_variance": None}, ValueError,
                         "running_variance must be 'biased' or 'unbiased', got None."),
    "axis": ({"axis": 2}, ValueError, "axis=2 is out of range for the shape (8, 6): an axis must "
             "lie in [-2, 1]."),
    "axis_name": ({"axis_name": 3}, ValueError, "axis_name must be the name of a mapped axis, a "
                  "tuple of them, or None, got 3."),
    "no axis_name": ({"axis_name": ()}, ValueError, "axis_name must be the name of a mapped axis, "
                     "a tuple of them, or None, got ()."),
    "groups": ({"axis_index_groups": [[0, 1]]}, ValueError, "axis_index_groups=((0, 1),) are "
               "groups of an axis: axis_name must name it, got None."),
    "virtual_batch_size": ({"virtual_batch_size": 2.0}, ValueError, "virtual_batch_size must be "
                           "None or a positive integer, got 2.0."),
    "dtype": ({"dtype": "int32"}, TypeError, "dtype must be a floating dtype, got int32."),
    "param_dtype": ({"param_dtype": "int32"}, TypeError,
                    "param_dtype must be a floating dtype, got int32."),
    "use_bias": ({"use_bias": "no"}, ValueError,
                 "use_bias must be a Python bool, got 'no' of type str."),
    "use_scale": ({"use_scale": None}, ValueError,
                  "use_scale must be a Python bool, got None of type NoneType."),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", OPTIONS)
def test_initialization_checks_every_option(case, train):
    options, kind, text = OPTIONS[case]
    with pytest.raises(kind) as raised:
        ours(**options).init(KEY, X, not train)
    assert str(raised.value) == text


class TestWhatRemainsDifferent:
    def test_epsilon_zero_in_training(self):
        with pytest.raises(ValueError, match=r"^epsilon must be at least 1\.2e-38"):
            ours(epsilon=0.0).init(KEY, X, False)
        variables = ours().init(KEY, X, False)
        assert_close(
            ours(epsilon=0.0).apply(variables, X, True),
            theirs(epsilon=0.0).apply(variables, X, True),
        )

    def test_complex(self):
        with pytest.raises(TypeError, match=r"^x must be of a floating dtype, got complex64"):
            ours().init(KEY, X.astype("complex64"), False)

    def test_mask_in_evaluation(self):
        mask = np.arange(8)[:, None] < 4
        variables = ours().init(KEY, X, False)
        y, flax = (layer().apply(variables, X, True, mask=mask) for layer in (ours, theirs))
        assert_close(y[:4], flax[:4])
        np.testing.assert_array_equal(y[4:], 0)
        assert_close(flax, theirs().apply(variables, X, True))

    def test_no_gradient_flows_into_new_statistics(self):
        def total(norm, x):
            updates = norm().apply(norm().init(KEY, X, False), x, False, mutable=["batch_stats"])[1]
            return sum(map(jnp.sum, jax.tree.leaves(updates)))

        np.testing.assert_array_equal(jax.grad(partial(total, ours))(X), 0)
        assert np.abs(jax.grad(partial(total, theirs))(X)).min() > 0
