"""`keep_finite` protects running statistics from batches that hold inf or NaN."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen


def state(value, count=1):
    return {
        "mean": jnp.full(3, value),
        "var": jnp.full(3, value + 1),
        "count": jnp.array(count, jnp.int32),
    }


def equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("leaf", ["mean", "var"])
def test_one_bad_value_keeps_the_whole_layer(bad, leaf):
    old, new = state(1.0, 4), state(2.0, 5)
    equal(jaxbn.keep_finite(old, new), new)
    spoiled = {**new, leaf: new[leaf].at[1].set(bad)}
    equal(jaxbn.keep_finite(old, spoiled), old)
    equal(jax.jit(jaxbn.keep_finite)(old, spoiled), old)


def test_each_layer_of_a_tree_is_kept_or_replaced_separately():
    old = {"block": {"bn1": state(1.0), "bn2": state(2.0)}, "bn": state(3.0)}
    new = {"block": {"bn1": state(4.0), "bn2": state(jnp.nan)}, "bn": state(5.0)}
    kept = jaxbn.keep_finite(old, new)
    wanted = {"block": {"bn1": new["block"]["bn1"], "bn2": old["block"]["bn2"]}, "bn": new["bn"]}
    equal(kept, wanted)
    assert kept["bn"]["count"].dtype == jnp.int32


@pytest.mark.parametrize("frozen", ["old", "new"])
def test_a_frozen_dict_beside_a_dict(frozen):
    old = {"bn1": state(1.0), "bn2": state(2.0)}
    new = {"bn1": state(4.0), "bn2": state(jnp.nan)}
    wanted = {"bn1": new["bn1"], "bn2": old["bn2"]}
    if frozen == "old":
        kept = jaxbn.keep_finite(flax.core.freeze(old), new)
    else:
        kept = jaxbn.keep_finite(old, flax.core.freeze(new))
        wanted = flax.core.freeze(wanted)
    assert jax.tree.structure(kept) == jax.tree.structure(wanted)
    equal(kept, wanted)


def test_the_old_state_may_hold_nan_already():
    equal(jaxbn.keep_finite(state(jnp.nan), state(1.0)), state(1.0))


def test_none_is_returned_unchanged():
    assert jaxbn.keep_finite(None, None) is None


def test_states_of_nnx():
    class Net(nnx.Module):
        def __init__(self):
            self.one = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.two = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    net = Net()
    old = nnx.state(net, nnx.BatchStat)
    new = jax.tree.map(lambda leaf: leaf + 1, old)
    spoiled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf * jnp.nan
            if all(name in jax.tree_util.keystr(path) for name in ("one", "var"))
            else leaf
        ),
        new,
    )
    kept = jaxbn.keep_finite(old, spoiled)
    assert jax.tree.structure(kept) == jax.tree.structure(new)
    equal(jax.tree.leaves(kept["one"]), jax.tree.leaves(old["one"]))
    equal(jax.tree.leaves(kept["two"]), jax.tree.leaves(new["two"]))


def test_together_with_apply_if_finite():
    """One batch of a training loop overflows: it leaves no trace, and training continues."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxbn.linen.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dense(1)(nn.relu(x))

    net = Net()
    x = jax.random.normal(jax.random.key(0), (16, 3))
    variables = net.init(jax.random.key(1), x)
    params, stats = variables["params"], variables["batch_stats"]
    tx = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=5)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, stats, opt_state, x):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            y, updates = net.apply(variables, x, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), updates["batch_stats"]

        (_, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), jaxbn.keep_finite(stats, new), opt_state

    before = step(params, stats, opt_state, x)
    after = step(*before, x.at[3, 1].set(jnp.inf))
    equal(after[:2], before[:2])
    again = step(*after, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again[:2]))
    assert np.abs(again[1]["BatchNorm_0"]["mean"] - after[1]["BatchNorm_0"]["mean"]).max() > 0


def test_errors():
    with pytest.raises(ValueError) as caught:
        jaxbn.keep_finite(state(1.0), {"bn": state(1.0)})
    assert str(caught.value) == (
        "old and new must have the same structure, got PyTreeDef({'count': *, 'mean': *, 'var': "
        "*}) and PyTreeDef({'bn': {'count': *, 'mean': *, 'var': *}})."
    )
    short = {**state(1.0), "var": jnp.ones(2)}
    with pytest.raises(ValueError) as caught:
        jaxbn.keep_finite(short, state(1.0))
    assert str(caught.value) == (
        "old and new must have leaves of the same shape, got (2,) and (3,) at ['var']."
    )
