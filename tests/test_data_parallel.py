"""The digits example on many devices: each step equals that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_examples.common import data
from train_examples.common.errors import UserError
from train_examples.common.model import ConvNet
from train_examples.common.training import correct, initial_state
from train_examples.data_parallel import __main__ as command
from train_examples.data_parallel import train as training
from train_examples.data_parallel.batches import Batch, data_mesh, padded, replicated, spread
from train_examples.data_parallel.compare import distance
from train_examples.data_parallel.config import MODES, Config, parse_args
from train_examples.data_parallel.steps import STEPS
from train_examples.data_parallel.train import on_devices
from train_examples.digits.train import optimizer, train_step

STEPS_COMPARED = 3
BATCH = 64

# A few steps, with sums of some thousand numbers in another order.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def one_device(digits):
    """A small network, its first state, and states and metrics of a few steps on one device."""
    with jax.enable_x64(True):
        model = ConvNet(widths=(4, 6), dtype=jnp.float64)
        # Without a warmup the first step moves the parameters.
        tx = optimizer(0.2, 9)
        start = initial_state(model, digits.train_images[:1], tx, Config(dtype="float64"))
        state, results = start, []
        for batch in batches(digits):
            state, metrics = train_step(state, *batch)
            results.append((state, metrics))
    return model, start, results


def test_distance_shows_differences_and_nan(one_device):
    _, _, [*_, (state, _)] = one_device
    assert distance(state, state) == 0
    for factor, wanted in [(2, 1), (np.nan, np.nan)]:
        moved = state.replace(
            batch_stats=jax.tree.map(lambda leaf, k=factor: k * np.asarray(leaf), state.batch_stats)
        )
        np.testing.assert_equal(distance(moved, state), wanted)


def batches(digits):
    all_batches = data.training_batches(digits.train_images, digits.train_labels, BATCH, 0, 0)
    return [batch for batch, _ in zip(all_batches, range(STEPS_COMPARED), strict=False)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [8, 7])
@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_those_of_one_device(mode, devices, digits, one_device):
    model, start, wanted = one_device
    backend = on_devices(model, mode, data_mesh(devices))
    state = backend.place(start)
    for batch, (wanted_state, wanted_metrics) in zip(batches(digits), wanted, strict=True):
        state, metrics = backend.step(state, *batch)
        assert distance(state, wanted_state) <= TOLERANCE
        np.testing.assert_allclose(metrics, wanted_metrics, rtol=TOLERANCE)
    assert distance(start, state) > 0.01
    for leaf in jax.tree.leaves(state):
        assert len(leaf.addressable_shards) == devices
        each = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        # Bit-identical on every device.
        np.testing.assert_array_equal(each, each[:1] * devices)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE),
        state.opt_state,
        wanted[-1][0].opt_state,
    )
    # Evaluation uses the state that the step left on the devices.
    part = digits.test_images[:50], digits.test_labels[:50], np.arange(50) < 43
    for statistics in ("moving", "batch"):
        alone = correct(jax.tree.map(np.asarray, state), *part, statistics)
        assert backend.correct(state, *part, statistics) == alone


@pytest.mark.usefixtures("x64")
def test_the_comparison_detects_padding_that_counts(digits, one_device):
    model, start, wanted = one_device
    mesh = data_mesh(7)
    images, labels = batches(digits)[0]
    batch = padded(Batch(images, labels, np.ones(BATCH, bool)), 7)
    batch = spread(batch._replace(mask=np.ones(70, bool)), mesh)
    step = STEPS["shard_map"](model, mesh)
    state, _ = step(step(replicated(start, mesh), batch)[0], batch)
    assert distance(state, wanted[1][0]) > 1e-3


def test_padding():
    batch = Batch(np.ones((5, 2, 2, 1), np.float32), np.arange(5), np.ones(5, bool))
    images, labels, mask = map(np.asarray, padded(batch, 4))
    assert images.shape == (8, 2, 2, 1) and images.dtype == np.float32
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, 0, 0, 0])
    np.testing.assert_array_equal(mask, np.arange(8) < 5)
    jax.tree.map(np.testing.assert_array_equal, padded(batch, 5), batch)


def test_more_devices_than_there_are():
    with pytest.raises(UserError) as error:
        data_mesh(9)
    assert str(error.value) == (
        "--devices 9 is more than the 8 that this process has of the kind cpu. Only CPU devices "
        "can be made, to any number: JAX_PLATFORMS=cpu in the environment asks for them."
    )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--devices", "0"], "--devices must be at least 1, got 0."),
        (["--processes", "0"], "--processes must be at least 1, got 0."),
        (
            ["--processes", "2", "--coordinator", "localhost:1234", "--process-id", "2"],
            "--process-id must be in [0, 2), as --processes is 2; got 2.",
        ),
        (
            ["--processes", "2", "--process-id", "1"],
            "--coordinator and --process-id go together: the address where process 0 listens, and "
            "which process this one is. Leave both out, and --processes starts all processes on "
            "this machine.",
        ),
        (
            ["--coordinator", "localhost:1234", "--process-id", "0"],
            "--coordinator is for several processes: --processes must be at least 2, got 1.",
        ),
        (
            ["--processes", "2", "--coordinator", "localhost", "--process-id", "1"],
            "--coordinator must be HOST:PORT, such as localhost:12345, got 'localhost'.",
        ),
        (["--epochs", "0"], "--epochs must be at least 1, got 0."),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


def test_bad_mode():
    with pytest.raises(UserError) as error:
        Config(mode="xmap")
    assert str(error.value) == "--mode must be one of shard_map, pmap, jit, got xmap."


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="error: --resume: there is no checkpoint"):
        command.main(["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("processes", [1, 2])
def test_interrupt(processes, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", interrupted)
    monkeypatch.setattr(command, "launch", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        command.main([f"--processes={processes}", "--devices=1", "--out", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == (
        f"stopped; --resume --out {tmp_path} continues after the last complete epoch.\n"
    )
