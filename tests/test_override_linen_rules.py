"""Which rules and functions `jaxbn.linen.override` takes, and which layers rules may name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

import jaxbn.linen
from jaxbn._rules import FLAX_LACKS
from tests.close import assert_equal
from tests.linen_models import MODELS, Compiled, Nested, Shared, data, initialized
from tests.raises import raises

override = jaxbn.linen.override
NOT_MATCHED = (
    "rules must only have patterns that match a batch norm of the model, got {}. The paths of its "
    "batch norms: {}."
)


def test_a_pattern_without_a_layer_is_refused():
    model = Nested(nn.BatchNorm)
    variables = initialized(model)
    paths = "'backbone/Block_0/BatchNorm_0', 'backbone/Block_1/BatchNorm_0', 'head'"
    for call in (
        lambda: override(model.apply, {"head": {}, "neck/**": {}})(variables, data(), False),
        lambda: override(model.init, {"neck/**": {}})(jax.random.key(0), data(), True),
    ):
        with raises(ValueError, NOT_MATCHED.format("'neck/**'", paths)):
            call()


@pytest.mark.parametrize("make", MODELS)
def test_paths_are_those_of_the_statistics(make):
    """A compiled part of the model is not traced again, so a second call must know its layers."""
    model = make(nn.BatchNorm)
    x, variables = data(), initialized(model)
    flat = flatten_dict(variables["batch_stats"])
    paths = sorted({"/".join(path[:-1]) for path in flat})
    init = override(model.init, {path: {"momentum": 0.5} for path in paths})
    for _ in range(2):
        init(jax.random.key(0), x, True)
    with raises(ValueError, NOT_MATCHED.format("'none'", ", ".join(map(repr, paths)))):
        override(model.init, {"none": {}})(jax.random.key(0), x, True)


def test_a_layer_that_is_not_called_may_be_named():
    class Model(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.BatchNorm(), nn.BatchNorm()

        def __call__(self, x):
            return self.decoder(self.encode(x), use_running_average=True)

        def encode(self, x):
            return self.encoder(x, use_running_average=True)

    model = Model()
    variables = model.init(jax.random.key(0), data())
    apply = override(model.apply, {"decoder": {"epsilon": 0.1}})
    assert_equal(
        apply(variables, data(), method="encode"), model.apply(variables, data(), method="encode")
    )


def test_a_model_without_batch_norms_is_refused():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), data())
    with raises(ValueError, NOT_MATCHED.format("'**'", "none")):
        override(model.apply, {"**": {"frozen": True}})(variables, data())


@pytest.mark.parametrize(
    ("rules", "error", "text"),
    [
        ([], TypeError, "rules must be a mapping, got list; for example "
         '{"backbone/**": {"frozen": True}}.'),
        ({0: {}}, TypeError, "rules must map path patterns, such as 'backbone/**', to "
         "options, got the pattern 0 of type int."),
        ({"**": True}, TypeError, "rules['**'] must be a mapping, got bool; for example "
         '{"frozen": True}.'),
        ({"**": {"axis": 1}}, ValueError, "rules['**'] may only have the options 'frozen', "
         "'track', 'momentum', 'epsilon', 'batch_variance', 'running_variance', 'axis_name', "
         "'axis_index_groups', 'virtual_batch_size', 'r_max', 'd_max'; got 'axis'."),
        ({"**": {"momentum": 2}}, ValueError, "momentum must be None or lie in [0, 1], got 2. It "
         "is the weight of the old value: PyTorch's momentum is one minus it."),
        ({"**": {"momentum": None}}, ValueError, "rules['**'] must have a number as 'momentum', "
         "got None: the cumulative average needs a count among the model's variables, which rules "
         "do not change."),
        ({"**": {"frozen": "yes"}}, ValueError, "frozen must be a Python bool, got 'yes' of type "
         "str."),
        ({"**": {"axis_name": None, "axis_index_groups": ((0, 1),)}}, ValueError,
         "axis_index_groups=((0, 1),) are groups of an axis: axis_name must name it, got None."),
    ],
)  # fmt: skip
def test_bad_rules_are_refused_at_once(rules, error, text):
    with raises(error, text):
        override(Nested(nn.BatchNorm).apply, rules)


@pytest.mark.parametrize(("fn", "name"), [(Compiled(nn.BatchNorm), "Compiled"), (None, "NoneType")])
def test_the_function_must_be_one(fn, name):
    with raises(TypeError, f"fn must be a function that runs a Linen model, such as model.apply, "
                f"got {name}."):  # fmt: skip
        override(fn, {})


def test_the_options_that_flax_lacks_have_the_defaults_of_the_layer():
    for name, value in FLAX_LACKS.items():
        assert getattr(jaxbn.linen.BatchNorm, name) == value
        assert not hasattr(nn.BatchNorm, name)


def test_another_kind_of_norm_is_not_matched():
    """Its statistics have the same names, but no rule could freeze them."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            return x - mean.value[None]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Own(name="own")(nn.BatchNorm(use_running_average=True, name="norm")(x))

    model = Model()
    variables = model.init(jax.random.key(0), data())
    with raises(ValueError, NOT_MATCHED.format("'own'", "'norm'")):
        override(model.apply, {"own": {"frozen": True}})(variables, data())


def test_a_pattern_without_a_layer_is_named_before_its_consequences():
    """Without the misspelt rule, the statistics would have to be mutable."""
    model = Shared(nn.BatchNorm)
    variables = initialized(model)
    apply = override(model.apply, {"shraed": {"frozen": True}})
    with raises(ValueError, NOT_MATCHED.format("'shraed'", "'shared'")):
        apply(variables, data(), True)


def test_an_error_in_a_function_without_variables_is_its_own():
    """The layers behind the error are not known then, so that no pattern can be judged."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="first")(x)
            x = x @ jnp.ones((3, 3))
            return nn.BatchNorm(use_running_average=True, name="second")(x)

    init = override(Model().init, {"second": {"frozen": True}})
    with pytest.raises(TypeError, match="dot_general"):
        init(jax.random.key(0), data())
