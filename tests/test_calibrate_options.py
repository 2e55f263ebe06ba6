"""The options of `recalibrate`: the number of passes, the estimator, the progress."""

import subprocess
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.calibration import CUTS, TOLERANCE, Chain, N, Norm, cut, data, initialized, one_step
from tests.close import assert_close
from tests.raises import raises

HINT = " To pass the model an argument of this name, make each batch a dict of keyword arguments."
# Four layers, and as many batches.
LAYERS, BATCHES = 4, len(CUTS["odd last"])


@pytest.fixture(scope="module")
def run():
    """Return a function that recalibrates a chain of four layers, and the exact statistics."""
    x = data()
    network, variables = initialized(Chain, x)
    call = partial(recalibrate, network, variables, cut(x, CUTS["odd last"]), train=True)
    return lambda **options: call(**options)["batch_stats"], one_step(network, variables, x)


@pytest.mark.parametrize("passes", [1, np.int64(2), 4, 5])
def test_each_pass_makes_another_layer_exact(run, passes):
    recalibrated, exact = run
    got = recalibrated(passes=passes)
    for layer in range(LAYERS):
        name = f"BatchNorm_{layer}"
        if layer < passes:
            assert_close(got[name], exact[name], TOLERANCE["float32"])
        else:
            # The batches of this test differ in their means.
            with pytest.raises(AssertionError):
                assert_close(got[name], exact[name], 1e-2)


def test_one_pass_is_the_merged_statistics_of_steps_on_single_batches():
    x = data()
    network, variables = initialized(Chain, x)
    got = recalibrate(network, variables, cut(x, [50, 51]), train=True, passes=1)["batch_stats"]
    steps = [one_step(network, variables, part) for part in cut(x, [50, 51])]
    wanted = jaxbn.calibrate.merge(steps, [3 * 50, 3 * 51])
    assert_close(got, wanted, TOLERANCE["float32"])


def test_the_error_of_one_pass_falls_like_one_over_the_batch_size():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4096, 4)).astype("float32")
    layer = partial(jaxbn.linen.BatchNorm, use_running_average=False)
    model = nn.Sequential([layer(), nn.relu, nn.Dense(16), layer()])
    variables: Any = model.init(jax.random.key(0), x)
    exact = recalibrate(model, variables, [x])["batch_stats"]["layers_3"]

    def error(size):
        got = recalibrate(model, variables, np.split(x, 4096 // size), passes=1)["batch_stats"]
        return np.sqrt(np.mean((got["layers_3"]["var"] / exact["var"] - 1) ** 2))

    # A factor of 16, up to the noise of a mean over 32 batches.
    assert 8 < error(8) / error(128) < 32


@pytest.mark.parametrize("flax_layer", [jaxbn.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(flax_layer):
    x = data(shape=(N, 4))
    norm = partial(flax_layer, 4, use_running_average=False, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm(), nnx.tanh, norm())
    state, events = nnx.state(model), []
    batches = cut(x, CUTS["two"])
    exact = recalibrate(model, state, batches, progress=lambda *event: events.append(event))
    assert events == [(1, 2, 1, 2), (1, 2, 2, 2), (2, 2, 1, 2), (2, 2, 2, 2)]
    one = recalibrate(model, state, batches, passes=1)
    assert_close(one["layers"][0], exact["layers"][0], 0)
    assert not np.allclose(
        one["layers"][2]["var"].get_value(), exact["layers"][2]["var"].get_value(), rtol=1e-2
    )
    unbiased = recalibrate(model, state, batches, running_variance="unbiased")["layers"][0]
    np.testing.assert_allclose(unbiased["var"].get_value(), x.var(0, ddof=1), rtol=1e-5)


def test_the_biased_variance_gives_the_outputs_of_the_training_step():
    x = data(shape=(10, 4))
    layer = Norm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    step = layer.apply(variables, x, mutable=["batch_stats"])[0]
    evaluating = layer.clone(use_running_average=True)
    of_layer, biased = (
        evaluating.apply(recalibrate(layer, variables, [x], **options), x)
        for options in ({}, {"running_variance": "biased"})
    )
    np.testing.assert_allclose(biased, step, rtol=1e-5, atol=1e-6)
    # As the docstring says: smaller by 5 % for ten values.
    np.testing.assert_allclose(of_layer, np.sqrt(9 / 10) * step, rtol=1e-4, atol=1e-5)


def test_progress_counts_passes_and_batches(run):
    recalibrated, _ = run
    events = []
    recalibrated(progress=lambda *event: events.append(event))
    assert events == [
        (number, LAYERS, batch, BATCHES)
        for number in range(1, LAYERS + 1)
        for batch in range(1, BATCHES + 1)
    ]
    events.clear()
    recalibrated(passes=2, progress=lambda *event: events.append(event))
    assert events[0] == (1, 2, 1, BATCHES) and events[-1] == (2, 2, BATCHES, BATCHES)


class Loader:
    """Batches whose number is unknown."""

    def __iter__(self):
        return iter(cut(data(), CUTS["two"]))


def test_the_number_of_batches_is_known_after_a_pass():
    network, variables = initialized(Chain, data())
    events = []
    options = {"passes": 2, "progress": lambda *event: events.append(event), "train": True}
    recalibrate(network, variables, Loader(), **options)
    assert events == [(1, 2, 1, None), (1, 2, 2, None), (2, 2, 1, 2), (2, 2, 2, 2)]


def test_a_bar_on_stderr(capsys):
    x = data(shape=(10, 4))
    layer = Norm(use_running_average=False)
    recalibrate(layer, layer.init(jax.random.key(0), x), [x], progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "pass 1 of 1" in printed.err and "100%" in printed.err


def test_a_bar_needs_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    x = data(shape=(10, 4))
    layer = Norm(use_running_average=False)
    with raises(
        ModuleNotFoundError,
        "progress=True needs the package rich, which is not installed: pip install rich, or pass a "
        "function that shows the progress.",
    ):
        recalibrate(layer, layer.init(jax.random.key(0), x), [x], progress=True)


def test_only_a_bar_imports_rich():
    code = "import sys; sys.modules['rich'] = None; import jaxbn.calibrate"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stderr == b""


@pytest.mark.parametrize(
    ("error", "text", "options"),
    [
        (
            ValueError,
            "passes must be None or an integer of at least 1, got 0." + HINT,
            {"passes": 0},
        ),
        (
            ValueError,
            "passes must be None or an integer of at least 1, got True." + HINT,
            {"passes": True},
        ),
        (TypeError, "progress must be a bool or a function, got 1." + HINT, {"progress": 1}),
        (
            ValueError,
            "running_variance must be 'biased' or 'unbiased', got 'exact'.",
            {"running_variance": "exact"},
        ),
    ],
)
def test_bad_options(run, error, text, options):
    with raises(error, text):
        run[0](**options)
