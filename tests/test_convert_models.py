"""Single layers of models of Keras, Haiku and Equinox."""

import equinox as eqx
import jax
import keras
import numpy as np

from jaxbn import convert
from tests.conversion import (
    FEATURES,
    assert_same,
    ignore_keras_warning,
    random_numbers,
)

pytestmark = ignore_keras_warning


def test_equinox_state_of_a_model():
    """The states of other layers, and the state that was passed, are not changed."""

    class Model(eqx.Module):
        first: eqx.nn.BatchNorm
        second: eqx.nn.BatchNorm

        def __init__(self):
            self.first, self.second = (
                eqx.nn.BatchNorm(FEATURES, "batch", mode=mode) for mode in ("batch", "ema")
            )

    model, state = eqx.nn.make_with_state(Model)()
    before = jax.tree.map(np.array, state)
    ours = random_numbers(("scale", "bias"), np.float32, count=None)
    layer, new_state = convert.to_equinox(*ours, model.second, state)
    assert_same(convert.from_equinox(layer, new_state), ours)
    assert_same(
        convert.from_equinox(model.first, new_state), convert.from_equinox(model.first, state)
    )
    assert_same(jax.tree.leaves(state), jax.tree.leaves(before))
    model = eqx.tree_at(lambda model: model.second, model, layer)
    assert_same(convert.from_equinox(model.second, new_state), ours)


def test_keras_model_by_path():
    model = keras.Sequential([keras.layers.Dense(FEATURES), keras.layers.BatchNormalization()])
    model.build((None, 3))
    ours = random_numbers(("scale", "bias"), np.float32, count=None)
    model.layers[1].set_weights(list(convert.to_keras(*ours).values()))
    weights = {v.path: v.numpy() for v in model.weights}
    prefix = model.layers[1].path
    assert_same(convert.from_keras(weights, prefix), ours)
    assert_same(convert.from_keras(weights, f"{prefix}/"), ours)
    assert convert.to_keras(*ours, prefix).keys() < weights.keys()


def test_haiku_modules_by_name():
    ours = random_numbers(("scale", "bias"), np.float32)
    params, state = convert.to_haiku(*ours, name="net/~/norm")
    assert list(params) == ["net/~/norm"]
    assert list(state) == ["net/~/norm/~/mean_ema", "net/~/norm/~/var_ema"]
    more = convert.to_haiku(*random_numbers((), np.float32, seed=9))
    merged = params | more[0], state | more[1]
    assert_same(convert.from_haiku(*merged, name="net/~/norm"), ours)
