"""The batch norms that `python -m jaxbn.parity` makes of each framework."""

import subprocess
import sys

import numpy as np
import pytest

import jaxbn.parity as parity
from jaxbn.parity._command.frameworks import FRAMEWORKS, Parameters, available, how_to_install
from tests import oracle

C = 5


def parameters(rng):
    return Parameters(*rng.uniform(0.5, 2, (2, C)).astype(np.float32))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_output_gradients_and_statistics(name, rng):
    given = parameters(rng)
    _, make = FRAMEWORKS[name]
    x, dy = rng.normal(size=(2, 32, C)).astype(np.float32)
    stepping, training = make(given), make(given)
    assert isinstance(stepping, parity.DifferentiableLayer)
    y, gradients = stepping.step(x, dy)
    truth = oracle.batch_norm(x, dy, *given, epsilon=1e-3 if name == "keras" else 1e-5)
    found = (y, gradients["x"], gradients["scale"], gradients["bias"])
    for value, wanted in zip(found, truth, strict=False):
        assert value.dtype == np.float32
        assert oracle.error(value, wanted) < 2e-6
    np.testing.assert_allclose(training.train(x), y, rtol=1e-6, atol=1e-6)
    for one, other in zip(training.running(), stepping.running(), strict=True):
        assert one.shape == (C,)
        np.testing.assert_allclose(one, other, rtol=1e-6)
    before = stepping.running()
    assert stepping.evaluate(x).shape == x.shape
    np.testing.assert_array_equal(stepping.running(), before)


@pytest.mark.parametrize("name", ["torch", "haiku", "equinox", "keras"])
def test_a_missing_framework_is_reported(name, monkeypatch, rng):
    monkeypatch.setitem(sys.modules, name, None)
    found, missing = available(["ours", name], parameters(rng))
    title, _ = FRAMEWORKS[name]
    assert list(found) == ["jaxbn"]
    assert missing == {title: f"{name} is not installed"}
    assert how_to_install(missing) == "pip install 'jaxbn[frameworks]' installs every framework"


def test_a_framework_that_runs_elsewhere_is_reported(monkeypatch, rng):
    import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    found, missing = available(["keras"], parameters(rng))
    assert (found, missing) == ({}, {"Keras": "Keras runs on its torch backend, not on JAX"})
    assert how_to_install(missing) == ""


def test_frameworks_are_imported_only_when_used():
    frameworks = ["torch", "haiku", "equinox", "keras", "rich", "matplotlib"]
    code = f"import sys, jaxbn.parity; print([m for m in {frameworks} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
