"""`jaxbn.nnx.override` equals a model that is written with the options in place."""

import copy
import pickle
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.close import assert_equal
from tests.nnx_models import MODELS, Nested, Shared, data, derived, made, statistics, train_step
from tests.raises import raises

override = jaxbn.nnx.override
OPTIONS = [
    {"frozen": True},
    {"track": False},
    {"momentum": 0.5, "epsilon": 0.1, "running_variance": "unbiased", "virtual_batch_size": 8},
]
PATHS = "'blocks/0/norm', 'blocks/1/norm', 'head'"


def variables_and_modules(model):
    """Return the path and the identity of each object."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable | nnx.Module):
            yield path, id(node)


def outcome(model):
    """Return what a training step and an evaluation give, and the statistics after each."""
    model.train()
    trained, after = train_step(model, data()), statistics(model)
    model.eval()
    return trained, after, nnx.jit(lambda model, x: model(x))(model, data()), statistics(model)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_model_with_the_options_in_place(make, options):
    """Bit for bit, as both are the same program: outputs, statistics and gradients."""
    theirs = made(make, nnx.BatchNorm)
    # Trace the original first, so that stale compiled functions inside the model would show.
    outcome(nnx.clone(theirs))
    override(theirs, {"**": options})
    assert_equal(outcome(theirs), outcome(made(make, partial(jaxbn.nnx.BatchNorm, **options))))


@pytest.mark.parametrize("make", MODELS)
def test_variables_are_the_very_objects_and_shared_layers_stay_shared(make):
    model = made(make, nnx.BatchNorm)
    before = list(variables_and_modules(model))
    values = nnx.to_pure_dict(nnx.state(model))
    override(model, {"**": {"frozen": True}})
    # A layer that is no longer shared would be listed twice.
    assert list(variables_and_modules(model)) == before
    assert_equal(nnx.to_pure_dict(nnx.state(model)), values)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_frozen_layers_stay_frozen(norm):
    model = made(Nested, norm)
    override(model, {"blocks/**": {"frozen": True}})
    before = statistics(model)
    for change in (model.train, model.eval, model.train):
        change()
        nnx.view(model, use_running_average=False)(data())
        model.blocks[0].norm(data(), use_running_average=False)
        assert_equal(statistics(model)["blocks"], before["blocks"])
    assert not np.allclose(statistics(model)["head"]["mean"], before["head"]["mean"])


def test_later_rules_win_and_a_rule_can_be_undone():
    model = made(Nested, nnx.BatchNorm)
    override(model, {"**": {"frozen": True, "momentum": 0.5}, "blocks/1/*": {"frozen": False}})
    norms = model.blocks[0].norm, model.blocks[1].norm, model.head
    assert [(norm.frozen, norm.momentum) for norm in norms] == [
        (True, 0.5), (False, 0.5), (True, 0.5),
    ]  # fmt: skip
    override(model, {"head": {"frozen": False}})
    assert [(norm.frozen, norm.momentum) for norm in norms] == [
        (True, 0.5), (False, 0.5), (False, 0.5),
    ]  # fmt: skip


def test_other_layers_are_unchanged():
    model = made(Nested, nnx.BatchNorm)
    override(model, {"head": {"frozen": True}})
    assert type(model.blocks[0].norm) is nnx.BatchNorm
    assert isinstance(model.head, nnx.BatchNorm) and isinstance(model.head, jaxbn.nnx.BatchNorm)


def test_a_derived_class_keeps_its_own_code():
    options = {"epsilon": 0.1, "frozen": False}
    theirs = made(Nested, partial(derived(nnx.BatchNorm), momentum=0.8))
    ours = made(Nested, partial(derived(jaxbn.nnx.BatchNorm), momentum=0.8))
    wanted = made(Nested, partial(derived(jaxbn.nnx.BatchNorm), momentum=0.8, **options))
    for model in (theirs, ours):
        override(model, {"**": options})
    # The layers share one class, so that compiled functions are not traced again for each layer.
    assert type(theirs.head) is type(theirs.blocks[0].norm)
    wanted = outcome(wanted)
    assert_equal(outcome(ours), wanted)
    assert_equal(outcome(theirs), wanted)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, derived(nnx.BatchNorm)])
def test_overridden_layers_can_be_calibrated(norm):
    """The changed class is observed, and a frozen layer keeps its statistics."""
    model = made(Nested, norm)
    override(model, {"head": {"frozen": True}, "blocks/0/*": {"momentum": 0.0}})
    before = statistics(model)
    state = recalibrate(model, nnx.state(model, nnx.BatchStat), [data()])
    x = data() @ model.blocks[0].dense.kernel[...]
    x = x if norm is nnx.BatchNorm else 2 * x
    np.testing.assert_allclose(state["blocks"][0]["norm"]["mean"][...], x.mean(0), rtol=1e-5)
    assert_equal(nnx.to_pure_dict(state)["head"], before["head"])
    assert_equal(statistics(model), before)


def test_overridden_models_can_be_copied_and_pickled():
    model = made(Nested, nnx.BatchNorm)
    override(model, {"**": {"frozen": True}})
    wanted = model(data())
    for other in (nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(other(data()), wanted)
        assert other.head.frozen and other.head.mean is not model.head.mean


def test_a_view_without_tracking_shares_the_variables():
    model = made(Nested, jaxbn.nnx.BatchNorm)
    before = statistics(model)
    second_pass = nnx.view(model, track=False)
    y = second_pass(data())
    assert_equal(statistics(model), before)
    assert second_pass.head.mean is model.head.mean and model.head.track
    assert_equal(model(data()), y)
    assert not np.allclose(statistics(model)["head"]["mean"], before["head"]["mean"])
    assert nnx.view(model, frozen=True).head.frozen and not model.head.frozen


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ({"head": {"frozen": True}, "neck": {}}, ValueError, "rules must only have patterns that "
         f"match a batch norm of the model, got 'neck'. The paths of its batch norms: {PATHS}."),
        ({"head": {"epsilon": -1.0}}, ValueError, "epsilon must be a finite number, not negative, "
         "got -1.0."),
        ({"head": {"frozen": True}, "blocks/**": {"axis_index_groups": ((0, 1),)}}, ValueError,
         "axis_index_groups=((0, 1),) are groups of an axis: axis_name must name it, got None."),
    ],
)  # fmt: skip
def test_bad_rules_leave_the_model_unchanged(rules, error, text):
    model = made(Nested, nnx.BatchNorm)
    before = nnx.graphdef(model)
    with raises(error, text):
        override(model, rules)
    assert nnx.graphdef(model) == before


def test_the_model_must_be_a_module():
    with raises(TypeError, "model must be a flax.nnx.Module, got GraphDef."):
        override(nnx.graphdef(made(Shared, nnx.BatchNorm)), {})


def test_groups_may_be_lists():
    """Attributes are part of the graph definition, which is hashed."""
    model = made(Shared, nnx.BatchNorm)
    override(model, {"**": {"axis_name": ["a", "b"], "axis_index_groups": [[0, 1], [2, 3]]}})
    hash(nnx.graphdef(model))
    assert model.first.norm.axis_index_groups == ((0, 1), (2, 3))
    assert jnp.ndim(model.first.norm.mean[...]) == 1
