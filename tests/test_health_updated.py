"""`assert_updated` names the layers that a training step has not moved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.health import assert_updated
from tests.health import LAYERS, NNX, Linen, data
from tests.raises import raises

ADVICE = (
    "In Linen, call `y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])` in "
    "training mode, and keep the updates. In NNX, call `model.train()`, and return the state from "
    "functions that JAX transforms."
)


def unmoved(paths, of=3):
    return (
        f"The training step did not update the running statistics of {len(paths)} of {of} batch "
        f"norms: {', '.join(paths)}. {ADVICE}"
    )


def not_finite(paths, of=3):
    return (
        f"The running statistics of {len(paths)} of {of} batch norms are not finite: "
        f"{', '.join(paths)}. Look for NaN and infinity in the batch. To keep them out of the "
        f"statistics, use jaxbn.keep_finite."
    )


def states(network):
    """Return the statistics of a Linen or NNX network, by themselves and among all variables."""
    if isinstance(network, Linen):
        return network.variables["batch_stats"], network.variables
    statistics, variables = (nnx.state(network.model, *of) for of in ((nnx.BatchStat,), ()))
    return tuple(map(nnx.to_pure_dict, (statistics, variables)))


@pytest.mark.parametrize("network", [Linen, NNX])
@pytest.mark.parametrize("whole", [0, 1])
def test_steps(network, whole):
    network = network()
    before = states(network)[whole]
    # Linen's dicts are in alphabetical order, and so are NNX's states.
    paths = sorted(LAYERS)
    with raises(AssertionError, unmoved(paths)):
        assert_updated(before, states(network)[whole])
    network.train(data()[:1])
    assert_updated(before, states(network)[whole])
    moved = states(network)[whole]
    network.train(data()[1:2]).change("entry", mean=lambda mean: mean * np.nan)
    with raises(AssertionError, not_finite(["entry"])):
        assert_updated(moved, states(network)[whole])


def test_a_layer_that_is_not_trained_and_one_that_is_infinite():
    network = Linen().train(data()[:1])
    before = states(network)[0]
    network.train(data()[1:2]).change("entry", mean=lambda m: m + np.inf)
    after = {**states(network)[0], "block": before["block"]}
    text = f"{unmoved(['block/norm'])}\n{not_finite(['entry'])}"
    with raises(AssertionError, text):
        assert_updated(before, after)
    with raises(AssertionError, text):
        assert_updated(nn.FrozenDict(before), after)


@pytest.mark.parametrize("moved", ["mean", "var"])
def test_a_single_value_is_enough_but_a_count_is_not(moved):
    before = {"mean": jnp.zeros(3), "var": jnp.ones(3), "count": jnp.int32(1)}
    counted = {**before, "count": jnp.int32(2)}
    with raises(AssertionError, unmoved(["the layer"], of=1)):
        assert_updated(before, counted)
    assert_updated(before, {**counted, moved: before[moved].at[1].add(1e-7)})


def test_arrays_of_numpy_and_other_dtypes():
    before = {"mean": np.zeros(3), "var": np.ones(3)}
    assert_updated(before, {"mean": np.zeros(3), "var": jnp.full(3, 2.0)})


def test_an_nnx_state_is_changed_in_place():
    model = NNX().model
    before = nnx.state(model, nnx.BatchStat)
    model(data()[0])
    with raises(
        ValueError,
        "before and after share their variables, so they are always equal. Before the step, copy "
        "the statistics: before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)).",
    ):
        assert_updated(before, nnx.state(model, nnx.BatchStat))
    copy = jax.tree.map(jnp.copy, before)
    model(data()[1])
    assert_updated(copy, nnx.state(model, nnx.BatchStat))


def test_donated_statistics():
    before = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    after = jax.jit(lambda s: jax.tree.map(lambda v: v + 1, s), donate_argnums=0)(before)
    with raises(
        ValueError,
        "before was donated to the training step: copy it before the step, with "
        "jax.tree.map(jnp.copy, before).",
    ):
        assert_updated(before, after)


def test_bad_trees():
    layer = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    with raises(ValueError, "after must have the 'mean' and 'var' of at least one batch norm."):
        assert_updated(layer, {"scale": jnp.ones(3)})
    with raises(
        ValueError, "before and after must have the same batch norms, got b in only one of them."
    ):
        assert_updated({"a": layer}, {"a": layer, "b": layer})
    with raises(ValueError, "before and after must have the same shapes, got (3,) and (2,) in a."):
        assert_updated({"a": layer}, {"a": {**layer, "var": jnp.ones(2)}})
    with raises(
        ValueError,
        "before and after must hold concrete arrays, got traced ones: call assert_updated outside "
        "jax.jit and other transforms.",
    ):
        jax.jit(assert_updated)(layer, layer)


def test_ignored_layers_need_not_be_updated():
    network = Linen()
    before = network.variables
    after = Linen().train(data()[:1]).variables
    unchanged = {**after["batch_stats"], "block": before["batch_stats"]["block"]}
    with pytest.raises(AssertionError, match="1 of 3 batch norms: block/norm"):
        assert_updated(before["batch_stats"], unchanged)
    assert_updated(before["batch_stats"], unchanged, ignore=["block/**"])
    with raises(ValueError, "after must have the 'mean' and 'var' of at least one batch norm."):
        assert_updated(before["batch_stats"], unchanged, ignore=["**"])
