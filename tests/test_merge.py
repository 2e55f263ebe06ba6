"""`merge` returns the state of all data, given those of shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jaxbn.nnx
from jaxbn.calibrate import merge
from tests import oracle
from tests.calibration import Chain, N, cut, data, initialized
from tests.close import assert_close


def state_of(x, ddof, count=None):
    state = {"mean": jnp.asarray(x.mean(0)), "var": jnp.asarray(x.var(0, ddof=ddof))}
    return state if count is None else {**state, "count": jnp.asarray(count)}


@pytest.mark.parametrize("estimator, ddof", [("unbiased", 1), ("biased", 0)])
def test_merged_shards_are_all_data(x64, estimator, ddof):
    x = data("float64", (N, 4))
    sizes = [40, 3, 58]
    states = [state_of(part, ddof, i) for i, part in enumerate(cut(x, sizes))]
    got = merge(states, sizes, running_variance=estimator)
    assert_close(got, state_of(x, ddof, 3), 1e-13)
    trees = [{"a": {"norm": state}, "b": state} for state in states]
    tree = merge(trees, [jnp.asarray(n) for n in sizes], running_variance=estimator)
    assert_close(tree, {"a": {"norm": got}, "b": got}, 0)
    by_layer = [{"a": n, "b": 7 * n} for n in sizes]
    assert_close(merge(trees, by_layer, running_variance=estimator)["a"]["norm"], got, 0)


def test_shards_of_one_or_no_value(x64):
    x = data("float64", (5, 4))
    nothing = jax.tree.map(lambda leaf: leaf * np.nan, state_of(x, 1))
    single = {"mean": jnp.asarray(x[4]), "var": jnp.full(4, np.nan)}
    got = merge([nothing, state_of(x[:4], 1), single, nothing], [0, 4, 1, 0])
    assert_close(got, state_of(x, 1), 1e-13)


def test_merge_of_trees():
    """Each layer of a tree of any containers is merged as it would be alone."""
    x = data()
    _, variables = initialized(Chain, x)
    linen = variables["batch_stats"]
    state = nnx.state(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchStat)
    one, two = ({"mean": jnp.full(3, m), "var": jnp.full(3, m + 1)} for m in (0.0, 4.0))
    for tree in (linen, freeze(linen), state, [one, two], (one, [two, one]), {"a": [two]}):
        rng = np.random.default_rng(0)
        other = jax.tree.map(lambda leaf, rng=rng: leaf + rng.uniform(1, 2, leaf.shape), tree)
        got = merge([tree, other], [30, 10], running_variance="biased")
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        leaves = [jax.tree.leaves(t) for t in (tree, other, got)]
        for i in range(0, len(leaves[0]), 2):  # mean and var, in the order of their names
            first, second, merged = (
                dict(zip(("mean", "var"), t[i : i + 2], strict=True)) for t in leaves
            )
            alone = merge([first, second], [30, 10], running_variance="biased")
            assert_close(merged, alone, 0)
            assert np.abs(merged["mean"] - first["mean"]).min() > 0.2


def test_merge_far_from_zero():
    x = (1e4 + np.random.default_rng(0).normal(size=(1000, 8))).astype("float32")
    parts = cut(x.astype("float64"), [300, 700])
    states = [{"mean": part.mean(0), "var": part.var(0, ddof=1)} for part in parts]
    got = merge(states, [300, 700])
    assert got["mean"].dtype == jnp.float32
    assert oracle.error(got["var"], x.astype("float64").var(0, ddof=1)) < 2e-7


@pytest.mark.parametrize("form", [list, tuple, np.array, iter])
def test_merge_takes_any_sequence(form):
    states = [state_of(x, 1) for x in cut(data(shape=(5, 4)), [3, 2])]
    assert_close(merge(iter(states), form([3, 2])), merge(states, [3, 2]), 0)


def test_counts_add_up_to_the_largest_of_their_dtype(x64):
    counts = np.array([2**31 - 5, 3], np.int64)
    for dtype in (np.int32, np.uint32, np.int64):
        states = [{**S, "count": jnp.asarray(count, dtype)} for count in counts]
        got = merge(states, [2, 2])["count"]
        assert got == 2**31 - 2 and got.dtype == dtype
    for more, dtype in ((2**31, np.uint32), (2**62, np.int64)):
        states = [{**S, "count": jnp.asarray(count, dtype)} for count in (more, 7)]
        got = merge(states, [2, 2])["count"]
        assert int(got) == more + 7 and got.dtype == dtype
    # Layers in a scan.
    stacked = {"mean": jnp.zeros((3, 2)), "var": jnp.ones((3, 2)), "count": jnp.arange(3)}
    np.testing.assert_array_equal(merge([stacked, stacked], [2, 2])["count"], [0, 2, 4])


def test_a_shard_without_values_may_hold_nan():
    nothing = {"mean": jnp.full(2, jnp.nan), "var": jnp.full(2, jnp.inf)}
    for estimator in ("biased", "unbiased"):
        for states, counts in (([S, nothing], [3, 0]), ([nothing, S], [0, 3])):
            assert_close(merge(states, counts, running_variance=estimator), S, 0)


S = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
NAN = {"mean": jnp.array([0, jnp.nan]), "var": jnp.ones(2)}
INFINITE = {"mean": jnp.zeros(2), "var": jnp.array([jnp.inf, 1])}
FULL = {**S, "count": jnp.asarray(2**31 - 2)}
SAME_LENGTH = "states and counts must have the same length, at least 1, got"
INTEGERS = "counts must be integers of at least 0, got"
PREFIX = "must be a number, or a tree of numbers that is a prefix of the state, got"
A_LIST = "for each shard of the data, got"
MERGE_ERRORS = {
    "none": (([], []), f"{SAME_LENGTH} 0 states and 0 counts."),
    "too few counts": (([S, S], [1]), f"{SAME_LENGTH} 2 states and 1 counts."),
    "shapes": (
        ([{"a": S}, {"a": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}], [2, 2]),
        "states must have the same shapes, got (2,), (3,) for 'mean' in a.",
    ),
    "mean and var": (
        ([{"a": {"mean": jnp.zeros(2), "var": jnp.ones(3)}}], [2]),
        "states must have 'mean' and 'var' of the same shape, got (2,) and (3,) in a.",
    ),
    "names": (
        ([{"a": {"kernel": jnp.zeros(2)}}], [2]),
        "states must have 'mean' and 'var' in each layer, and may have 'count', got ['kernel'] in "
        "a.",
    ),
    "no layer": (([{}], [2]), "states must have 'mean' and 'var' of at least one layer, got {}."),
    "negative": (([S], [-1]), f"{INTEGERS} -1."),
    "no integer": (([S], [1.5]), f"{INTEGERS} 1.5."),
    "NaN": (([S], [float("nan")]), f"{INTEGERS} nan."),
    "infinite": (([S], [float("inf")]), f"{INTEGERS} inf."),
    "no number": (([S], ["two"]), f"{INTEGERS} 'two'."),
    "no prefix": (
        ([{"a": S}, {"a": S}], [2, {"b": 2}]),
        f"counts[1] {PREFIX} {{'b': 2}} for a state of structure "
        "PyTreeDef({'a': {'mean': *, 'var': *}}).",
    ),
    "no value": (
        ([S, S], [0, 0]),
        "counts must add up to at least 2 for unbiased variances, got 0.",
    ),
    "NaN in a mean": (
        ([{"a": S}, {"a": NAN}], [3, 1]),
        "states[1] must be finite, as counts[1] is 1, got NaN or infinity in 'mean' in a; the "
        "count of a shard without values is 0.",
    ),
    "infinity in a variance": (
        ([INFINITE, S], [2, 2]),
        "states[0] must be finite, as counts[0] is 2, got NaN or infinity in 'var'; the count of "
        "a shard without values is 0.",
    ),
    "count": (
        ([{"a": FULL}, {"a": FULL}], [2, 2]),
        "states must have a 'count' that adds up to at most 2147483647, the largest int32, got "
        "4294967292 in a; leave 'count' out, or reduce it.",
    ),
}
TYPE_ERRORS = {
    "mapping of states": (
        ({"a": S}, [2]), f"states must be a list with one state {A_LIST} dict.",
    ),
    "mapping of counts": (
        ([{"a": S}], {"a": 2}),
        f"counts must be a list with one number, or a tree of numbers, {A_LIST} dict.",
    ),
    "number": (
        ([S], 2), f"counts must be a list with one number, or a tree of numbers, {A_LIST} int.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MERGE_ERRORS, *TYPE_ERRORS])
def test_merge_errors(name):
    args, message = {**MERGE_ERRORS, **TYPE_ERRORS}[name]
    with pytest.raises(ValueError if name in MERGE_ERRORS else TypeError) as error:
        merge(*args)
    assert str(error.value) == message


def test_errors_about_structures_and_estimators():
    with pytest.raises(ValueError, match=r"states must have the same structure, got PyTreeDef"):
        merge([S, {"a": S}], [1, 1])
    with pytest.raises(ValueError, match="running_variance must be 'biased' or 'unbiased'"):
        merge([S], [2], running_variance="sample")
