"""`jaxbn.linen.override` equals a model that is written with the options in place."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn.calibrate import recalibrate
from tests.close import assert_close, assert_equal
from tests.linen_models import (
    MODELS,
    Nested,
    Shared,
    data,
    derived,
    initialized,
    train_step,
)

override = jaxbn.linen.override
OPTIONS = [
    {"frozen": True},
    {"track": False},
    {"momentum": 0.5, "epsilon": 0.1, "running_variance": "unbiased", "virtual_batch_size": 8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_model_with_the_options_in_place(make, options):
    """Bit for bit, as both are the same program: outputs, statistics and gradients."""
    theirs, ours = make(nn.BatchNorm), make(partial(jaxbn.linen.BatchNorm, **options))
    x, variables = data(), initialized(theirs)
    # Trace the original first, so that stale compiled functions inside the model would show.
    before = train_step(theirs.apply, variables, x)
    overridden = override(theirs.apply, {"**": options})
    assert_equal(train_step(overridden, variables, x), train_step(ours.apply, variables, x))
    evaluate = partial(jax.jit, static_argnums=2)
    assert_equal(
        evaluate(overridden)(variables, x, False), evaluate(ours.apply)(variables, x, False)
    )
    assert_equal(train_step(theirs.apply, variables, x), before)


@pytest.mark.parametrize("make", MODELS)
def test_variables_do_not_change(make):
    model, rules = make(nn.BatchNorm), {"**": {"frozen": True, "epsilon": 0.1}}
    init = override(model.init, rules)
    assert_equal(init(jax.random.key(0), data(), True), model.init(jax.random.key(0), data(), True))


@pytest.mark.usefixtures("x64")
def test_frozen_statistics_stay_and_gradients_are_those_of_evaluation():
    model = Nested(nn.BatchNorm)
    x, variables = jax.tree.map(lambda v: v.astype(jnp.float64), (data(), initialized(model)))
    apply = override(model.apply, {"**": {"frozen": True}})
    (dparams, dx), (y, updates) = train_step(apply, variables, x)
    assert_equal(updates["batch_stats"], variables["batch_stats"])

    def loss(params, x):
        y = model.apply({**variables, "params": params}, x, False)
        return jnp.sum(jnp.sin(y)), y

    (wanted_dparams, wanted_dx), wanted_y = jax.grad(loss, (0, 1), has_aux=True)(
        variables["params"], x
    )
    # The rounding of values up to 100 through three layers, in another order than Flax's.
    assert_close((dparams, dx, y), (wanted_dparams, wanted_dx, wanted_y), 1e-11)


def test_rules_choose_layers_and_later_rules_win():
    model = Nested(nn.BatchNorm)
    x, variables = data(), initialized(model)
    rules = {
        "backbone/**": {"frozen": True, "momentum": 0.0},
        "backbone/Block_1/*": {"frozen": False},
    }
    _, (_, updates) = train_step(override(model.apply, rules), variables, x)
    old, new = variables["batch_stats"], updates["batch_stats"]
    assert_equal(new["backbone"]["Block_0"], old["backbone"]["Block_0"])
    # With momentum 0, the mean is that of the batch; without, one step of 0.99 moves it little.
    moved = [
        float(jnp.max(jnp.abs(new_mean - old_mean) / jnp.abs(old_mean)))
        for new_mean, old_mean in (
            (new["backbone"]["Block_1"]["BatchNorm_0"]["mean"],
             old["backbone"]["Block_1"]["BatchNorm_0"]["mean"]),
            (new["head"]["mean"], old["head"]["mean"]),
        )
    ]  # fmt: skip
    assert moved[0] > 0.5 and 0 < moved[1] < 0.2


def test_overrides_stack_and_the_outer_one_wins():
    model = Nested(nn.BatchNorm)
    x, variables = data(), initialized(model)
    inner = override(model.apply, {"**": {"epsilon": 0.1, "momentum": 0.5}})
    stacked = override(partial(inner, train=True), {"head": {"momentum": 0.9}})
    at_once = override(
        model.apply, {"**": {"epsilon": 0.1, "momentum": 0.5}, "head": {"momentum": 0.9}}
    )
    got = jax.jit(lambda v, x: stacked(v, x, mutable=["batch_stats"]))(variables, x)
    assert_equal(
        got, jax.jit(lambda v, x: at_once(v, x, True, mutable=["batch_stats"]))(variables, x)
    )


def test_a_derived_class_keeps_its_own_code():
    model = Nested(partial(derived(nn.BatchNorm), momentum=0.8))
    x, variables = data(), initialized(model)
    got = train_step(override(model.apply, {"**": {"epsilon": 0.1}}), variables, x)
    wanted = Nested(partial(derived(jaxbn.linen.BatchNorm), momentum=0.8, epsilon=0.1))
    assert_equal(got, train_step(wanted.apply, variables, x))
    ours = Nested(partial(derived(jaxbn.linen.BatchNorm), momentum=0.8))
    assert_equal(got, train_step(override(ours.apply, {"**": {"epsilon": 0.1}}), variables, x))


def test_an_option_that_the_layer_has_is_kept():
    model = Shared(partial(nn.BatchNorm, momentum=0.7, epsilon=0.03, use_bias=False))
    wanted = Shared(
        partial(jaxbn.linen.BatchNorm, momentum=0.7, epsilon=0.03, use_bias=False, track=True)
    )
    x, variables = data(), initialized(model)
    got = train_step(override(model.apply, {"shared": {"track": True}}), variables, x)
    assert_equal(got, train_step(wanted.apply, variables, x))


def test_a_momentum_may_be_traced():
    model = Shared(nn.BatchNorm)
    x, variables = data(), initialized(model)

    @jax.jit
    def step(momentum):
        apply = override(model.apply, {"**": {"momentum": momentum}})
        return apply(variables, x, True, mutable=["batch_stats"])[1]

    assert_equal(step(1.0)["batch_stats"], variables["batch_stats"])


def test_without_mutable_statistics_where_none_are_tracked():
    model = Nested(nn.BatchNorm)
    variables = initialized(model)
    for options in ({"track": False}, {"frozen": True}):
        y = override(model.apply, {"**": options})(variables, data(), True)
        assert y.shape == data().shape


def test_axis_name_synchronizes_a_model_that_lacks_one():
    model = Nested(nn.BatchNorm)
    x, variables = data(), initialized(model)
    apply = override(model.apply, {"**": {"axis_name": "devices"}})
    y, updates = jax.pmap(
        lambda v, x: apply(v, x, True, mutable=["batch_stats"]),
        in_axes=(None, 0),
        axis_name="devices",
    )(variables, x.reshape(4, 8, 4))
    wanted, wanted_updates = model.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, atol=1e-4)
    jax.tree.map(
        lambda got, one: np.testing.assert_allclose(got[0], one, rtol=1e-5),
        updates,
        wanted_updates,
    )


def test_a_function_is_new_and_keeps_the_signature():
    model = Nested(nn.BatchNorm)
    first, second = (override(model.apply, {"**": {"epsilon": e}}) for e in (0.1, 0.2))
    assert first is not second and first.__name__ == "apply"
    x, variables = data(), initialized(model)
    outputs = [jax.jit(fn, static_argnums=2)(variables, x, False) for fn in (first, second)]
    assert not np.allclose(*outputs)


def test_rules_hold_while_a_model_is_recalibrated():
    model = Nested(nn.BatchNorm)
    variables = initialized(model)
    rules = {"backbone/**": {"frozen": True}, "head": {"epsilon": 0.1}}
    got = override(recalibrate, rules)(model, variables, [data()], train=True)
    ours = Nested(jaxbn.linen.BatchNorm)
    in_place = recalibrate(ours, variables, [data()], train=True)
    old, new = variables["batch_stats"], got["batch_stats"]
    assert_equal(new["backbone"], old["backbone"])
    assert not np.allclose(in_place["batch_stats"]["backbone"]["Block_0"]["BatchNorm_0"]["mean"],
                           old["backbone"]["Block_0"]["BatchNorm_0"]["mean"])  # fmt: skip
    # The head's input is that of evaluation.
    _, state = model.apply(variables, data(), False, capture_intermediates=True)
    head_input = state["intermediates"]["Dense_0"]["__call__"][0]
    np.testing.assert_allclose(new["head"]["mean"], head_input.mean(0), rtol=1e-5)
