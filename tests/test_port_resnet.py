"""The ResNet-18 from PyTorch: equal results, conversion, folding, export, the command."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.missing_package import assert_help_alone_works
from train_examples.common.errors import UserError, needs_extra
from train_examples.port_resnet import command, deploy, flax_model, torch_model
from train_examples.port_resnet.__main__ import main
from train_examples.port_resnet.compare import (
    Comparison,
    distance,
    distances,
    random_batch,
    run_both,
    run_torch,
)
from train_examples.port_resnet.config import parse_args
from train_examples.port_resnet.convert import path, to_flax
from train_examples.port_resnet.weights import as_dtype, lively

WIDTH, CLASSES, PIXELS = 4, 10, 32
TOLERANCE = command.FLOAT64_TOLERANCE
SMALL = ["--image-size", str(PIXELS), "--batch-size", "4"]


@pytest.fixture(scope="module")
def state_dict():
    return lively(WIDTH, CLASSES, 0)


@pytest.fixture(scope="module")
def batch():
    return random_batch(6, PIXELS, CLASSES, 0)


@pytest.fixture(scope="module")
def float64_results(state_dict, batch):
    """Return the results of PyTorch and of Flax."""
    return run_both(state_dict, batch, np.float64)


def test_equal_in_float64(float64_results):
    theirs, ours = float64_results
    for row, difference in distances(ours, theirs).items():
        assert difference <= TOLERANCE, row


def test_every_array_is_compared(float64_results, state_dict):
    theirs, _ = float64_results
    # Each entry of the state dict is compared once: its gradient, or its value after a step.
    compared = sum(len(arrays) for row, arrays in theirs.items() if "logits" not in row)
    assert compared == len(state_dict) + len(["the gradient by images"])
    for row, arrays in theirs.items():
        assert all(np.abs(array).max() > 1e-3 for array in arrays), row


def swap_mean_and_var(norm):
    norm.running_mean, norm.running_var = norm.running_var, norm.running_mean.abs()


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda norm: setattr(norm, "eps", 1e-3), ["logits in evaluation", "logits in training"]),
        (lambda norm: setattr(norm, "momentum", 0.01), ["running means after"]),
        (swap_mean_and_var, ["logits in evaluation", "running variances after"]),
        (lambda norm: norm.running_var.fill_(torch.nan), ["logits in evaluation"]),
    ],
    ids=["epsilon", "momentum", "mean and variance swapped", "NaN"],
)
def test_a_difference_in_one_layer_is_detected(
    x64, float64_results, state_dict, batch, change, rows
):
    _, ours = float64_results
    model = torch_model.load(state_dict)
    change(model.layer3[1].bn2)
    differences = distances(ours, run_torch(model, batch))
    for row in rows:
        assert not differences[row] <= 1e3 * TOLERANCE, row


def test_float32_is_not_further_from_the_truth(x64, state_dict, batch, monkeypatch):
    # If rounding moves the input of a ReLU across zero, its gradient appears or vanishes, in either
    # framework. A smooth activation leaves rounding alone.
    monkeypatch.setattr(flax_model.nn, "relu", jax.nn.silu)
    monkeypatch.setattr(torch_model.functional, "relu", torch.nn.functional.silu)
    truth = run_torch(torch_model.load(state_dict), batch)
    errors = [distances(run, truth) for run in run_both(state_dict, batch, np.float32)]
    for row, theirs in errors[0].items():
        ours, eps = errors[1][row], float(np.finfo(np.float32).eps)
        # Of two sums with equally many roundings, one can well have three times the other's error.
        assert ours <= 3 * theirs + eps, row
        # The tolerance of float64, scaled to float32's eps.
        assert ours <= TOLERANCE * eps / np.finfo(np.float64).eps, row


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("conv1", ("conv1",)),
        ("layer1.0.conv1", ("layer1_0", "conv1")),
        ("layer4.1.bn2", ("layer4_1", "bn2")),
        ("layer2.0.downsample.1", ("layer2_0", "downsample_1")),
    ],
)
def test_paths(name, wanted):
    assert path(name) == wanted


def test_converted_variables_are_the_network_s(x64, state_dict):
    model = flax_model.ResNet18(WIDTH, CLASSES)
    images = jnp.zeros((1, PIXELS, PIXELS, 3))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))
    converted = to_flax(state_dict)
    for stats in jax.tree.leaves(converted["batch_stats"], is_leaf=lambda d: "mean" in d):
        del stats["count"]
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, wanted)


def test_conversion_lists_what_is_wrong(state_dict):
    wrong = {k: v for k, v in state_dict.items() if k not in ("bn1.weight", "fc.bias")}
    wrong["fc.scale"] = np.ones(3)
    wrong["layer1.0.conv2.weight"] = np.ones((4, 3, 3, 3))
    wrong["bn1.bias"] = np.ones(4, np.int64)
    with pytest.raises(UserError) as error:
        to_flax(wrong)
    assert str(error.value) == (
        "these are not the weights of a ResNet-18 in torchvision's names: bn1.weight is missing; "
        "fc.bias is missing; fc.scale is not of this network; layer1.0.conv2.weight has the shape "
        "(4, 3, 3, 3), not (4, 4, 3, 3); bn1.bias has the dtype int64."
    )


def test_conversion_lists_ten_of_many_problems(state_dict):
    with pytest.raises(UserError, match=r"conv1.weight is missing; .*; and 113 more\.$") as error:
        to_flax({"model": np.ones(3)})
    # 122 entries are missing and one is unknown: ten are listed, the rest are counted.
    assert str(error.value).count(" is missing") == 10


@pytest.fixture
def networks(state_dict):
    """Return the network and the folded network, in the current precision."""
    dtype = jnp.result_type(float)
    variables = to_flax(as_dtype(state_dict, dtype))
    model = flax_model.ResNet18(WIDTH, CLASSES)
    folded = deploy.folded(variables)
    assert folded.keys() == {"params"}
    return deploy.evaluation(model, variables), deploy.evaluation(model.clone(folded=True), folded)


def test_folded_is_equal(x64, networks, batch):
    whole, folded = (np.asarray(network(batch.images)) for network in networks)
    assert distance([folded], [whole]) <= 1e-12


def test_every_batch_norm_is_folded(state_dict):
    pairs = deploy.pairs(to_flax(as_dtype(state_dict, np.float32)))
    assert len(pairs) == 20
    assert pairs["conv1"] == "bn1"
    assert pairs["layer1_0/conv2"] == "layer1_0/bn2"
    assert pairs["layer4_0/downsample_0"] == "layer4_0/downsample_1"


def test_export_and_back(tmp_path, networks, batch):
    images = np.asarray(batch.images, np.float32)
    _, folded = networks
    file = tmp_path / "new" / "network.jax"
    deploy.write(folded, PIXELS, file)
    exported = deploy.read(file)
    for number in (1, 5):
        np.testing.assert_allclose(
            exported(images[:number]), folded(images[:number]), rtol=1e-5, atol=1e-5
        )
    assert os.listdir(file.parent) == ["network.jax"]


def test_a_file_is_written_whole_or_not(tmp_path, networks, monkeypatch):
    file = tmp_path / "network.jax"
    file.write_bytes(b"old")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError) as error:
        deploy.write(networks[1], PIXELS, file)
    assert str(error.value) == f"--out {file} cannot be written: No space left on device."
    assert os.listdir(tmp_path) == ["network.jax"]
    assert file.read_bytes() == b"old"


def test_the_command(tmp_path, state_dict, batch, float64_results, monkeypatch, capsys):
    def computed_once(of, on, dtype):
        # The file holds the weights of `float64_results`, and the options give its batch.
        if dtype != np.float64:
            return run_both(of, on, dtype)
        np.testing.assert_equal((dict(of), on), (dict(state_dict), batch))
        return float64_results

    monkeypatch.setattr("train_examples.port_resnet.compare.run_both", computed_once)
    file, out = tmp_path / "weights.safetensors", tmp_path / "network.jax"
    weights = as_dtype(state_dict, np.float32)
    save_file({name: torch.tensor(value) for name, value in weights.items()}, file)
    main(["--state-dict", str(file), "--out", str(out), *SMALL, "--batch-size", "6"])
    printed = " ".join(capsys.readouterr().out.split())
    for row in ("logits in training", "gradients by kernels", "running variances after"):
        assert row in printed
    assert "folded 20 batch norms: logits differ by" in printed
    assert "its logits of 5 images differ by" in printed
    assert deploy.read(out)(np.zeros((2, PIXELS, PIXELS, 3), np.float32)).shape == (2, CLASSES)


@pytest.mark.parametrize("difference", [1e-6, np.nan])
def test_the_command_fails_where_the_frameworks_differ(tmp_path, monkeypatch, capsys, difference):
    rows = {
        "logits in training": Comparison(1e-14, 1e-6, 1e-6),
        "running means after": Comparison(difference, 1e-6, 1e-6),
    }
    monkeypatch.setattr(command, "compare", lambda state_dict, batch: rows)
    out = tmp_path / "network.jax"
    with pytest.raises(SystemExit) as error:
        main(["--width", "2", "--out", str(out), *SMALL])
    assert error.value.code == "error: the frameworks differ in float64: running means after."
    assert f"{difference:.0e}" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_help_without_a_package(package):
    assert_help_alone_works("train_examples.port_resnet", package, "--state-dict FILE")


def test_a_missing_module_of_this_project_raises():
    with pytest.raises(ModuleNotFoundError, match="train_examples"), needs_extra("test"):
        raise ModuleNotFoundError("No module named 'train_examples.x'", name="train_examples.x")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--width 0", "--width must be at least 1, got 0."),
        ("--image-size 31", "--image-size must be at least 32, got 31."),
        ("--batch-size 3", "--batch-size must be at least 4, got 3."),
        ("--seed -1", "--seed must be in [0, 2^32), got -1."),
        (
            "--state-dict x.pt --width 8",
            "--width sets the width of random weights; --state-dict has its own.",
        ),
        ("--out .", "--out . is a folder; it must be a file, or not exist yet."),
    ],
)
def test_options(argv, text, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert text in capsys.readouterr().err
