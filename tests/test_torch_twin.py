"""The PyTorch twin: equal trajectories in float64, detected differences, rounding, the command."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from matplotlib import image

from tests.missing_package import assert_help_alone_works
from train_examples.common import data
from train_examples.common import model as flax_model
from train_examples.torch_twin import command, report, torch_model
from train_examples.torch_twin import lockstep as twin
from train_examples.torch_twin.__main__ import main
from train_examples.torch_twin.config import Config, parse_args
from train_examples.torch_twin.lockstep import (
    TRUTH,
    Distance,
    History,
    Name,
    batches,
    distance,
    lockstep,
    pairs,
    start,
)
from train_examples.torch_twin.runs import Batch, FlaxRun, TorchRun, initial, network

# Two stages, so that there is a pooling, and wide enough for each layer to learn.
TINY = Config(steps=8, widths=(4, 8), batch_size=16, reordered=2)
OURS = Name("jaxbn", "float64")

# The longest sums are over a batch of 16 images of 8 x 8 pixels.
LAYERS, TERMS = 5, 16 * 8 * 8


def tolerance(steps):
    """Return a bound on the rounding of all layers' sums, forward and backward, in float64.

    It assumes that no step amplifies the rounding before it.
    """
    return steps * 2 * LAYERS * TERMS * 2**-53


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, as starting threads takes longer than these small sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset():
    return data.digits()


@pytest.fixture(scope="module")
def variables(dataset):
    return initial(TINY, dataset.train_images[:1])


@pytest.fixture(scope="module")
def history(variables):
    # Share the initial variables, as they take longer to compile than everything else.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twin, "initial", lambda *_: variables)
        return twin.train(TINY)


@pytest.mark.parametrize("kind", report.TITLES)
def test_equal_in_float64(history, kind):
    ours, reordered = report.curves(history, kind, "float64")
    bounds = tolerance(np.arange(1, TINY.steps + 1))
    assert (ours <= bounds).all()
    assert (reordered <= bounds).all()
    # Equal bits would mean that a run was compared with itself.
    assert ours.min() > 0 and reordered.min() > 0


def test_losses_are_equal_in_float64(history):
    ours, theirs = (np.array(history.loss[name]) for name in (OURS, TRUTH))
    assert ours.shape == (TINY.steps,)
    np.testing.assert_allclose(ours, theirs, rtol=tolerance(TINY.steps))


def test_runs_start_from_the_same_weights(x64, variables):
    runs = start(TINY, variables)
    wanted = runs[TRUTH].entries()
    assert [str(name) for name in runs] == [
        *("jaxbn float64", "PyTorch float64", "reordered 0 float64"),
        *("jaxbn float32", "PyTorch float32", "reordered 0 float32", "reordered 1 float32"),
    ]
    for name, run in runs.items():
        entries = run.entries()
        assert entries.keys() == wanted.keys()
        for key, value in entries.items():
            assert value.dtype == (np.int64 if "num_batches" in key else name.dtype), key
            np.testing.assert_array_equal(value, wanted[key])


def test_every_entry_is_compared(variables):
    entries = FlaxRun(network(Config()), TINY, variables).entries()
    ones = {name: np.ones_like(value) for name, value in entries.items()}
    for name in ones:
        if "num_batches" in name:
            continue
        found = distance({**ones, name: ones[name] * 2}, ones)
        assert (found.parameters > 0) != (found.statistics > 0), name
        assert (found.statistics > 0) == ("running" in name), name
    assert distance(ones, ones) == (0, 0)


def test_distance_is_relative():
    one = {"a.weight": np.array([[3.0]]), "a.bias": np.array([4.0]), "a.running_var": np.ones(4)}
    other = {
        "a.weight": np.array([[0.0]]),
        "a.bias": np.array([8.0]),
        "a.running_var": np.full(4, 2),
    }
    assert distance(one, other) == Distance(5 / 8, 1 / 2)


@pytest.fixture(scope="module")
def flax_run(variables):
    """Return the run in JAX and its initial state."""
    with jax.enable_x64(True):
        model = network(TINY, "float64")
        run = FlaxRun(model, TINY, variables)
        yield run, run.state


def norms(run):
    return [layer for name, layer in run.model.items() if "BatchNorm" in name]


def set_norms(attribute, value):
    def change(run):
        for norm in norms(run):
            setattr(norm, attribute, value)

    return change


def biased_running_variance(run):
    def correct(norm, inputs, _):
        biased, unbiased = (inputs[0].detach().var((0, 2, 3), correction=c) for c in (0, 1))
        # Not in place, as the backward pass needs the old value.
        norm.running_var = norm.running_var + norm.momentum * (biased - unbiased)

    for norm in norms(run):
        norm.register_forward_hook(correct)


def set_sgd(option, value):
    def change(run):
        run.sgd.param_groups[0][option] = value

    return change


def one_layer_s_bias(run):
    with torch.no_grad():
        run.model["BatchNorm_1"].bias[0] += 1e-6


@pytest.mark.parametrize(
    ("change", "parameters", "statistics"),
    [
        (lambda run: None, False, False),
        (set_norms("eps", 1e-3), True, True),
        # Training does not read the running statistics.
        (set_norms("momentum", 0.01), False, True),
        (biased_running_variance, False, True),
        (set_sgd("nesterov", True), True, True),
        (set_sgd("dampening", 0.1), True, True),
        (set_sgd("momentum", 0.99), True, True),
        (one_layer_s_bias, True, True),
    ],
    ids=["none", "epsilon", "momentum", "biased", "nesterov", "dampening", "SGD", "bias"],
)
def test_a_difference_is_detected(x64, flax_run, dataset, change, parameters, statistics):
    """A difference is detected after three steps; some have no effect in the first."""
    ours, ours.state = flax_run
    theirs = TorchRun(TINY, ours.entries())
    change(theirs)
    few = list(batches(TINY, dataset))[:3]
    found = lockstep({OURS: ours, TRUTH: theirs}, [(OURS, TRUTH)], few).distances[OURS, TRUTH][-1]
    assert (found.parameters > 1e-8) == parameters
    assert (found.statistics > 1e-8) == statistics
    for differs, value in zip((parameters, statistics), found, strict=True):
        assert differs or value <= tolerance(3)


def test_divergence_is_an_error(x64, flax_run, dataset):
    ours, ours.state = flax_run
    theirs = TorchRun(TINY, ours.entries())
    theirs.sgd.param_groups[0]["lr"] = float("nan")
    message = r"^training diverged in step 1: lower --learning-rate\.$"
    with pytest.raises(command.UserError, match=message):
        lockstep({OURS: ours, TRUTH: theirs}, [(OURS, TRUTH)], batches(TINY, dataset))


def test_smooth_networks_differ_by_rounding_alone(x64, variables, dataset, monkeypatch):
    """The distances in float32 over those in float64 are then the ratio of their roundings."""
    monkeypatch.setattr(flax_model.nn, "relu", jax.nn.silu)
    monkeypatch.setattr(flax_model.nn, "max_pool", flax_model.nn.avg_pool)
    monkeypatch.setattr(torch_model.functional, "relu", torch.nn.functional.silu)
    monkeypatch.setattr(torch_model.functional, "max_pool2d", torch.nn.functional.avg_pool2d)
    runs = start(TINY, variables)
    smooth = lockstep(runs, pairs(runs), batches(TINY, dataset))
    for kind in report.TITLES:
        double, single = (report.curves(smooth, kind, dtype) for dtype in ("float64", "float32"))
        growth = single.ours / double.ours / 2**29
        # Both are sums of equally many random roundings, whose sizes are similar.
        for factor in (growth, single.ratio):
            assert (factor < 4).all() and (factor > 1 / 4).all()


def test_batches_are_the_digits_example_s(dataset):
    images, labels = dataset.train_images, dataset.train_labels
    wanted = data.training_batches(images, labels, TINY.batch_size, TINY.seed, 0)
    got = list(batches(TINY, dataset))
    assert len(got) == TINY.steps
    for (a, b), (c, d) in zip(got, wanted, strict=False):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


def test_epochs_follow_one_another(dataset):
    few = data.Dataset(*(array[:40] for array in dataset))
    got = list(batches(TINY, few))
    assert len(got) == TINY.steps
    assert len({batch.images.tobytes() for batch in got}) == TINY.steps


def test_reordering_keeps_images_with_their_labels(rng):
    batch = Batch(np.arange(12.0).reshape(6, 2), np.arange(6))
    got = batch.reordered(rng)
    assert sorted(got.labels) == list(range(6)) and list(got.labels) != list(range(6))
    np.testing.assert_array_equal(got.images, batch.images[got.labels])


@pytest.fixture
def quick(monkeypatch, history):
    """Make the command use the history that is already computed."""
    monkeypatch.setattr(command, "train", lambda config: history)


def test_the_command(quick, history, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    main(["--steps", str(TINY.steps), "--out", str(out)])
    printed = capsys.readouterr().out
    for title in ("parameters", "running statistics"):
        assert f"Distance of {title} from PyTorch's run" in printed
    assert re.search(r"\| after step +\| +1 \| +8 \|", printed)
    assert "float32: at the end jaxbn's parameters are " in printed
    assert re.search(r"float64: \S+ apart at most, in 8 steps: within 1e-08", printed)

    numbers = json.loads((out / "distances.json").read_text())
    assert numbers["options"]["steps"] == TINY.steps
    assert numbers["loss"] == {str(name): values for name, values in history.loss.items()}
    assert len(numbers["distances"]) == len(history.distances)
    first = numbers["distances"][0]
    assert (first["run"], first["from"]) == ("jaxbn float64", "PyTorch float64")
    assert first["parameters"] == [d.parameters for d in history.distances[OURS, TRUTH]]
    assert image.imread(out / "distances.png")[..., :3].std() > 0.01


def test_the_command_fails_if_the_frameworks_diverge(monkeypatch, history, tmp_path, capsys):
    distances = {**history.distances, (OURS, TRUTH): [Distance(1e-16, 2e-8)] * TINY.steps}
    monkeypatch.setattr(command, "train", lambda config: History(history.loss, distances))
    with pytest.raises(SystemExit) as error:
        main(["--out", str(tmp_path)])
    assert error.value.code == "error: the frameworks diverge in float64."
    assert "2.0e-08 apart at most, in 8 steps: NOT within 1e-08" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 2


def test_help_without_pytorch():
    assert_help_alone_works("train_examples.torch_twin", "torch", "--learning-rate")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--steps 0", "--steps must be at least 1, got 0."),
        ("--learning-rate nan", "--learning-rate must be positive and finite, got nan."),
        ("--seed -1", "--seed must be in [0, 2^32), got -1."),
        (
            f"--out {__file__}",
            f"--out {__file__} is a file; it must be a folder, or not exist yet.",
        ),
    ],
)
def test_options(argv, text, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert text in capsys.readouterr().err
