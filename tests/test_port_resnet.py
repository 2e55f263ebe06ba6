"""The ResNet-18 from PyTorch: equal results, conversions, files, folding, export, the command."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
from train_examples.port_resnet.weights import as_dtype, lively, read

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
    """PyTorch's and ours."""
    return run_both(state_dict, batch, np.float64)


def test_equal_in_float64(float64_results):
    theirs, ours = float64_results
    for row, difference in distances(ours, theirs).items():
        assert difference <= TOLERANCE, row


def test_every_array_is_compared(float64_results, state_dict):
    theirs, _ = float64_results
    # Each entry of the state dict once: as its gradient, or as what a step has made of it.
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
def test_one_layer_that_differs_shows(x64, float64_results, state_dict, batch, change, rows):
    _, ours = float64_results
    model = torch_model.load(state_dict)
    change(model.layer3[1].bn2)
    differences = distances(ours, run_torch(model, batch))
    for row in rows:
        assert not differences[row] <= 1e3 * TOLERANCE, row


def test_float32_is_not_further_from_the_truth(x64, state_dict, batch, monkeypatch):
    # Where rounding takes the input of a ReLU over zero, its gradient is gone, in either
    # framework: without a kink rounding alone is left.
    monkeypatch.setattr(flax_model.nn, "relu", jax.nn.silu)
    monkeypatch.setattr(torch_model.functional, "relu", torch.nn.functional.silu)
    truth = run_torch(torch_model.load(state_dict), batch)
    errors = [distances(run, truth) for run in run_both(state_dict, batch, np.float32)]
    for row, theirs in errors[0].items():
        ours, eps = errors[1][row], float(np.finfo(np.float32).eps)
        # Of two sums of as many roundings one may well be thrice as far off as the other.
        assert ours <= 3 * theirs + eps, row
        # And as float64's tolerance, in units of each one's eps.
        assert ours <= TOLERANCE * eps / np.finfo(np.float64).eps, row


def test_random_weights_are_lively(state_dict):
    for name, value in state_dict.items():
        assert not np.any((value == 0) | (value == 1)), name
    assert any((value < 0).any() for name, value in state_dict.items() if "bn1.weight" in name)
    np.testing.assert_equal(lively(WIDTH, CLASSES, 0), state_dict)
    float32 = as_dtype(state_dict, np.float32)
    np.testing.assert_equal(as_dtype(float32, np.float64), state_dict)


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
    # 122 entries are missing and one is too many: ten are told, the rest counted.
    assert str(error.value).count(" is missing") == 10


def tensors(state_dict):
    return {name: torch.tensor(value).contiguous() for name, value in state_dict.items()}


WRITERS = {".pt": torch.save, ".pth": torch.save, ".safetensors": save_file}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reads_what_was_saved(tmp_path, state_dict, ending, dtype):
    file = tmp_path / f"weights{ending}"
    saved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors(state_dict).items()}
    WRITERS[ending](saved, file)
    got = read(file)
    assert got.keys() == state_dict.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(got[name], value.double().numpy())


def test_batches_that_were_not_counted_are_none(tmp_path, state_dict):
    file = tmp_path / "old.pth"
    old = {k: v for k, v in tensors(state_dict).items() if not k.endswith("num_batches_tracked")}
    torch.save(old, file)
    got = read(file)
    assert got.keys() == state_dict.keys()
    assert got["layer1.0.bn1.num_batches_tracked"] == 0


class Malicious:
    """A pickle of it makes a folder as it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_runs_nothing(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "weights.pt"
    torch.save({"conv1.weight": Malicious(victim)}, file)
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or no state dict: "):
        read(file)
    file.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or no state dict: "):
        read(file)
    assert not victim.exists()


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_damaged_file(tmp_path, state_dict, ending, part):
    file = tmp_path / f"weights{ending}"
    WRITERS[ending](tensors(state_dict), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"is damaged, or no state dict: ."):
        read(file)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "model": {}}])
def test_a_file_with_more_than_tensors(tmp_path, content):
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == (
        f"--state-dict {file} must hold a dict of tensors, by their names, alone."
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.pt", "is not a file."),
        ("weights.h5", "must end in one of .safetensors, .pt, .pth, got '.h5'."),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text):
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert str(error.value) == f"--state-dict {tmp_path / name} {text}"


# Of tensors that PyTorch saves, those that are no arrays.
UNREADABLE = {
    "int key": (
        lambda tensor: {3: tensor},
        "must hold tensors by their names, got the key 3.",
    ),
    "bytes key": (
        lambda tensor: {b"fc.weight": tensor},
        "must hold tensors by their names, got the key b'fc.weight'.",
    ),
    "sparse": (
        lambda tensor: {"fc.weight": tensor.to_sparse()},
        "must hold dense tensors, got a sparse fc.weight: save what its to_dense() returns.",
    ),
    "meta": (
        lambda tensor: {"fc.weight": tensor.to("meta")},
        "must hold dense tensors, got a meta fc.weight: it has no values, so load the weights "
        "before saving.",
    ),
    "quantized": (
        lambda tensor: {"fc.weight": torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)},
        "must hold dense tensors, got a quantized fc.weight: save what its dequantize() returns.",
    ),
    "nested": (
        lambda tensor: {"fc.weight": torch.nested.nested_tensor([tensor, tensor[1:]])},
        "must hold dense tensors, got a nested fc.weight: save its parts.",
    ),
    "a dtype of bits": (
        lambda tensor: {"fc.weight": tensor.view(torch.uint8).view(torch.bits8)},
        "must hold tensors of a dtype that NumPy has, or can be made of, got torch.bits8 for "
        "fc.weight.",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
# PyTorch warns of kinds of tensors that it will not have some day, where they are made.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_read(tmp_path, capsys, kind):
    make, text = UNREADABLE[kind]
    file = tmp_path / "weights.pt"
    torch.save({"bn1.weight": torch.ones(2), **make(torch.ones(10, 4))}, file)
    with pytest.raises(SystemExit) as error:
        main(["--state-dict", str(file)])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: --state-dict {file} {text}\n"


@pytest.fixture
def networks(state_dict):
    """The network and the folded one, in the precision at hand."""
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


def test_the_command(tmp_path, state_dict, capsys):
    file, out = tmp_path / "weights.safetensors", tmp_path / "network.jax"
    save_file(tensors(as_dtype(state_dict, np.float32)), file)
    main(["--state-dict", str(file), "--out", str(out), *SMALL])
    printed = " ".join(capsys.readouterr().out.split())
    for row in ("logits in training", "gradients by kernels", "running variances after"):
        assert row in printed
    assert "folded 20 batch norms: logits differ by" in printed
    assert "its logits of 3 images differ by" in printed
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


def test_the_command_says_what_is_wrong_with_a_file(tmp_path, capsys):
    file = tmp_path / "none.pt"
    with pytest.raises(SystemExit) as error:
        main(["--state-dict", str(file)])
    # As argparse has it for a wrong option.
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: --state-dict {file} is not a file.\n"


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_help_without_a_package(package):
    """The options are told, and a run says what to install."""

    def run(*argv):
        code = (
            f"import runpy, sys; sys.modules[{package!r}] = None; "
            f"sys.argv[1:] = {list(argv)}; "
            "runpy.run_module('train_examples.port_resnet', run_name='__main__')"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    told = run("--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "--state-dict FILE" in told.stdout
    refused = run()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f'error: {package} is not installed; pip install -e ".[test]" installs it.\n'
    )


def test_a_module_of_ours_that_is_missing_is_a_fault():
    with pytest.raises(ModuleNotFoundError, match="train_examples"), needs_extra("test"):
        raise ModuleNotFoundError("No module named 'train_examples.x'", name="train_examples.x")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--width 0", "--width must be at least 1, got 0."),
        ("--image-size 31", "--image-size must be at least 32, got 31."),
        ("--batch-size 3", "--batch-size must be at least 4, got 3."),
        ("--seed -1", "--seed must be in [0, 2^32), got -1."),
        ("--state-dict x.pt --width 8", "--width is of random weights: those of --state-dict"),
        ("--out .", "--out . is a folder; it must be a file, or not exist yet."),
    ],
)
def test_options(argv, text, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert text in capsys.readouterr().err
