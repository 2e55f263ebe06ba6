"""Bad names of mapped axes and bad groups raise errors that say what is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn

X = np.zeros((8, 3), np.float32)


@pytest.mark.parametrize("groups", [[[0], [1, 2, 3]], [[0, 1]], [[0, 1], [1, 2]], []])
def test_groups_that_do_not_divide_the_axis(groups):
    def step(x):
        return jaxbn.batch_norm({}, None, x, True, axis_name="a", axis_index_groups=groups)[0]

    with pytest.raises(ValueError) as caught:
        jax.pmap(step, axis_name="a")(np.ones((4, 8, 3), np.float32))
    assert str(caught.value) == (
        f"axis_index_groups={groups!r} must be groups of one size that hold each index of "
        f"axis_name='a', 0 to 3, once."
    )


def test_one_value_on_each_of_several_devices_is_enough():
    def step(x):
        return jaxbn.batch_norm({}, None, x, True, axis_name="batch")[0]

    y = jax.vmap(step, axis_name="batch")(jnp.array([[[1.0]], [[3.0]]]))
    np.testing.assert_allclose(np.ravel(y), [-1, 1], atol=1e-5)
    with pytest.raises(ValueError, match="one value per feature"):
        jax.vmap(step, axis_name="batch")(jnp.zeros((1, 1, 1)))


@pytest.mark.parametrize("groups", [5, [0, 1], [["a"]], "ab"])
def test_groups_that_are_none(groups):
    with pytest.raises(ValueError) as caught:
        jaxbn.batch_norm({}, None, X, True, axis_name="a", axis_index_groups=groups)
    assert str(caught.value) == (
        f"axis_index_groups must be a sequence of groups of indices, such as [[0, 1], [2, 3]], got "
        f"{groups!r}."
    )


@pytest.mark.parametrize("axis_name", [{}, (), 3, True, [[]]])
def test_names_that_are_none(axis_name):
    with pytest.raises(ValueError) as caught:
        jaxbn.batch_norm({}, None, X, True, axis_name=axis_name)
    assert str(caught.value) == (
        f"axis_name must be the name of a mapped axis, a tuple of them, or None, got {axis_name!r}."
    )


@pytest.mark.parametrize("names", [("i", "i"), ["i", "j", "i"]])
def test_a_name_given_twice(names):
    def step(x):
        return jaxbn.batch_norm({}, None, x, True, axis_name=names)[0]

    over = jax.vmap(jax.vmap(step, axis_name="j"), axis_name="i")
    with pytest.raises(ValueError) as caught:
        over(jnp.zeros((2, 2, 8, 3)))
    assert str(caught.value) == f"axis_name must name each mapped axis once, got {names!r}."


PAIRS = [[0, 1], [2, 3]]


def in_pairs(x):
    return jaxbn.batch_norm({}, None, x, True, axis_name="a", axis_index_groups=PAIRS)[0]


def sharded(step, *, check_vma):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(step, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check_vma)


def conditional(x):
    return jax.lax.cond(True, in_pairs, lambda x: x, x)


@pytest.mark.parametrize(
    "mapped",
    [
        jax.vmap(in_pairs, axis_name="a"),
        jax.jit(jax.vmap(in_pairs, axis_name="a")),
        jax.vmap(jax.jit(in_pairs), axis_name="a"),
        jax.vmap(conditional, axis_name="a"),
        jax.vmap(jax.grad(lambda x: in_pairs(x).sum()), axis_name="a"),
        sharded(in_pairs, check_vma=True),
        jax.jit(sharded(in_pairs, check_vma=True)),
        sharded(jax.jit(in_pairs), check_vma=True),
    ],
    ids=[
        *("vmap", "jit of vmap", "vmap of jit", "vmap of cond", "vmap of grad"),
        *("shard_map", "jit of shard_map", "shard_map of jit"),
    ],
)
def test_groups_where_jax_has_none(mapped):
    with pytest.raises(ValueError) as caught:
        mapped(np.zeros((4, 8, 3), np.float32))
    assert str(caught.value) == (
        "axis_index_groups=[[0, 1], [2, 3]] need an axis of pmap, or of shard_map with "
        "check_vma=False, as JAX has no groups elsewhere: axis_name='a' is an axis of vmap, or of "
        "shard_map with check_vma=True."
    )


@pytest.mark.parametrize(
    "mapped",
    [
        jax.pmap(in_pairs, axis_name="a"),
        jax.pmap(jax.jit(in_pairs), axis_name="a"),
        jax.pmap(jax.vmap(in_pairs), axis_name="a"),
        jax.jit(sharded(in_pairs, check_vma=False)),
        jax.jit(sharded(jax.vmap(in_pairs), check_vma=False)),
    ],
    ids=["pmap", "pmap of jit", "pmap of vmap", "shard_map", "shard_map of vmap"],
)
def test_groups_where_jax_has_them(mapped):
    x = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    # Within pairs: 0 and 1, 2 and 3.
    np.testing.assert_allclose(np.ravel(mapped(x)), [-1, 1, -1, 1], rtol=1e-4)


def test_evaluation_without_a_state_shares_statistics():
    def evaluate(x, state):
        return jaxbn.batch_norm({}, state, x, False, axis_name="a")[0]

    x = jnp.array([[[1.0]], [[3.0]]])
    y = jax.vmap(lambda x: evaluate(x, None), axis_name="a")(x)
    np.testing.assert_allclose(np.ravel(y), [-1, 1], rtol=1e-4)
    with pytest.raises(ValueError) as caught:
        evaluate(x[0], None)
    assert str(caught.value) == (
        "axis_name='a' is not bound: call batch_norm inside a vmap, pmap or shard_map that names "
        "it, or pass axis_name=None."
    )
    state = {"mean": jnp.ones(1), "var": jnp.ones(1)}
    np.testing.assert_allclose(evaluate(x[1], state), 2, rtol=1e-4)
