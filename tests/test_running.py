"""Running statistics are averaged with the right weights, dtypes and kinds of mapping."""

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import close

# Averages of five batches of some ten values of order one, in float32: ten roundings.
TOLERANCE = 1e-6

# Rows that count in each batch: none, all, one (which has a mean and a biased variance), some.
ROWS = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]


def batches(rng):
    """Yield inputs of shape (4, 2), NaN where masked out, and masks of shape (4, 1)."""
    for rows in ROWS:
        mask = np.array(rows, bool)[:, None]
        x = (2 + 3 * rng.normal(size=(4, 2))).astype(np.float32)
        yield np.where(mask, x, np.nan).astype(np.float32), mask


def average(statistics):
    """Return the mean over batches of their means and variances."""
    return {
        "mean": np.mean([mean for mean, _ in statistics], 0),
        "var": np.mean([var for _, var in statistics], 0),
    }


def of(values):
    values = values.astype(np.float64)
    return values.mean(0), values.var(0)


def assert_close(state, wanted):
    got = {name: state[name] for name in wanted}
    close.assert_close(got, wanted, TOLERANCE, dtypes=False)


class TestCumulativeAverage:
    """Each batch that has values has the same weight, and the initial state has none."""

    def test_masked_batches(self, rng):
        _, state = jaxbn.init((4, 2), track_count=True)
        statistics = []
        for x, mask in batches(rng):
            _, state = jaxbn.batch_norm(
                {}, state, x, True, mask=mask, momentum=None, running_variance="biased"
            )
            statistics += [of(x[mask[:, 0]])] if mask.any() else []
            assert state["count"] == len(statistics)
            if statistics:
                assert_close(state, average(statistics))
        assert len(statistics) == 3

    def test_masked_ghost_batches(self, rng):
        _, state = jaxbn.init((4, 2), track_count=True)
        statistics = []
        for x, mask in batches(rng):
            _, state = jaxbn.batch_norm(
                *({}, state, x, True),
                **{"mask": mask, "momentum": None, "running_variance": "biased"},
                virtual_batch_size=2,
            )
            halves = [of(x[i : i + 2][mask[i : i + 2, 0]]) for i in (0, 2) if mask[i : i + 2].any()]
            if halves:
                statistics.append(tuple(average(halves).values()))
                assert_close(state, average(statistics))
            assert state["count"] == len(statistics)
        assert len(statistics) == 3

    def test_masked_batches_over_devices(self, rng):
        _, state = jaxbn.init((4, 2), track_count=True)

        def step(state, x, mask):
            return jaxbn.batch_norm(
                *({}, state, x, True),
                **{"mask": mask, "momentum": None, "running_variance": "biased"},
                axis_name="devices",
            )[1]

        over = jax.jit(jax.vmap(step, (None, 0, 0), axis_name="devices"))
        statistics = []
        for x, mask in batches(rng):
            states = over(state, x.reshape(2, 2, 2), mask.reshape(2, 2, 1))
            state = jax.tree.map(lambda leaf: leaf[1], states)
            statistics += [of(x[mask[:, 0]])] if mask.any() else []
            assert state["count"] == len(statistics)
            if statistics:
                assert_close(state, average(statistics))
        assert len(statistics) == 3

    @pytest.mark.parametrize(
        ("mask", "running_variance", "text"),
        [
            (
                np.ones((4, 2), bool),
                "biased",
                "momentum=None, the cumulative average, counts batches for all features together, "
                "and a mask that differs between features, such as one of shape (4, 2) with "
                "features on axis 1, may leave some of them without a value: give a mask of size 1 "
                "along the features, or a momentum.",
            ),
            (
                np.ones((4, 1), bool),
                "unbiased",
                "momentum=None, the cumulative average, counts batches for mean and variance "
                "together, and a batch in which a mask leaves one value has a mean but no unbiased "
                "variance: pass running_variance='biased', or a momentum.",
            ),
        ],
    )
    def test_masks_that_it_cannot_count(self, mask, running_variance, text):
        x = np.ones((4, 2), np.float32)
        _, state = jaxbn.init(x.shape, track_count=True)
        options = {"mask": mask, "running_variance": running_variance}
        with pytest.raises(ValueError) as caught:
            jaxbn.batch_norm({}, state, x, True, momentum=None, **options)
        assert str(caught.value) == text
        # Nothing is counted in evaluation, without a state, or by a momentum.
        jaxbn.batch_norm({}, state, x, False, momentum=None, **options)
        jaxbn.batch_norm({}, None, x, True, momentum=None, **options)
        _, new = jaxbn.batch_norm({}, state, x, True, momentum=0.5, **options)
        np.testing.assert_array_equal(new["mean"], 0.5)


NUMBERS = {
    "Python": lambda value: value,
    "NumPy": np.float64,
    "JAX": lambda value: jnp.asarray(value, jnp.float64),
}


@pytest.mark.usefixtures("x64")
class TestDtypes:
    """Dtypes follow the state and the input, whatever the dtypes of the options."""

    @pytest.mark.parametrize("number", NUMBERS)
    @pytest.mark.parametrize("traced", [False, True])
    def test_of_momentum_and_epsilon(self, rng, number, traced):
        convert = NUMBERS[number]
        xs = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
        _, state = jaxbn.init((4, 2), track_count=True)

        def run(momentum, epsilon):
            def step(state, x):
                y, state = jaxbn.batch_norm({}, state, x, True, momentum=momentum, epsilon=epsilon)
                return state, y

            return jax.lax.scan(step, state, xs)

        wanted = run(0.9, 1e-3)
        got = (jax.jit(run) if traced else run)(convert(0.9), convert(1e-3))
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(got)]
        assert dtypes == [jnp.int32, jnp.float32, jnp.float32, jnp.float32]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6), got, wanted)

    @pytest.mark.parametrize(
        ("state_dtype", "x_dtype", "wanted"),
        [
            ("bfloat16", "float32", "float32"),
            ("float16", "bfloat16", "float32"),
            ("float32", "float16", "float32"),
            ("float64", "float32", "float64"),
            ("float32", "float64", "float64"),
        ],
    )
    @pytest.mark.parametrize("momentum", [0.25, np.float64(0.25), np.float16(0.25), 1, None])
    def test_of_state_and_input(self, state_dtype, x_dtype, wanted, momentum):
        state = {"mean": jnp.full(2, 8, state_dtype), "var": jnp.full(2, 8, state_dtype)}
        x = jnp.array([[1, 2], [3, 4]], x_dtype)
        _, new = jaxbn.batch_norm(
            *({}, state | {"count": jnp.int32(3)}, x, True),
            **{"momentum": momentum, "running_variance": "biased"},
        )
        assert new["mean"].dtype == new["var"].dtype == wanted
        # Powers of two, so that no dtype rounds.
        weight = 0.25 if momentum is None else 1 - momentum
        np.testing.assert_array_equal(new["mean"], (1 - weight) * 8 + weight * np.array([2, 3]))
        np.testing.assert_array_equal(new["var"], (1 - weight) * 8 + weight * np.array([1, 1]))

    @pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16])
    def test_momentum_in_half_precision_is_not_rounded_again(self, kind):
        momentum = kind(0.3)
        x = jnp.array([[1.0], [1.0]], jnp.float32)
        _, new = jaxbn.batch_norm({}, jaxbn.init(x.shape)[1], x, True, momentum=momentum)
        np.testing.assert_allclose(new["mean"], 1 - float(momentum), rtol=2.0**-23)


@jax.tree_util.register_pytree_node_class
class Statistics(Mapping):
    """A mapping registered with JAX, without names for the paths to its leaves."""

    def __init__(self, **leaves):
        self.leaves = leaves

    def __getitem__(self, name):
        return self.leaves[name]

    def __iter__(self):
        return iter(self.leaves)

    def __len__(self):
        return len(self.leaves)

    def tree_flatten(self):
        names = tuple(sorted(self.leaves, reverse=True))
        return [self.leaves[name] for name in names], names

    @classmethod
    def tree_unflatten(cls, names, leaves):
        return cls(**dict(zip(names, leaves, strict=True)))


KINDS = {
    "dict": dict,
    "OrderedDict": lambda state: OrderedDict(reversed(state.items())),
    "FrozenDict": flax.core.freeze,
    "registered": lambda state: Statistics(**state),
}


class TestKind:
    @pytest.fixture
    def x(self, rng):
        return jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("track_count", [False, True])
    def test_training_returns_the_kind_it_got(self, x, kind, track_count):
        _, plain = jaxbn.init(x.shape, track_count=track_count)
        state = KINDS[kind](plain)
        _, wanted = jaxbn.batch_norm({}, plain, x, True)
        _, new = jaxbn.batch_norm({}, state, x, True)
        assert type(new) is type(state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, dict(new), wanted)

        def step(state, x):
            return jaxbn.batch_norm({}, state, x, True)[::-1]

        last, _ = jax.lax.scan(step, state, x[None])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), dict(last), wanted)

    def test_a_mapping_that_jax_does_not_know_becomes_a_dict(self, x):
        _, plain = jaxbn.init(x.shape)
        _, new = jaxbn.batch_norm({}, MappingProxyType(plain), x, True)
        assert type(new) is dict
        jax.tree.map(np.testing.assert_array_equal, new, jaxbn.batch_norm({}, plain, x, True)[1])

    @pytest.mark.parametrize("kind", [*KINDS.values(), MappingProxyType])
    def test_evaluation_returns_the_very_state(self, x, kind):
        state = kind(jaxbn.init(x.shape)[1])
        assert jaxbn.batch_norm({}, state, x, False)[1] is state
