"""The weights of the ResNet-18: random ones, files that are read, and files that are refused."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from train_examples.common.errors import UserError
from train_examples.port_resnet.__main__ import main
from train_examples.port_resnet.weights import as_dtype, lively, read


@pytest.fixture(scope="module")
def state_dict():
    return lively(4, 10, 0)


def test_random_weights_are_lively(state_dict):
    for name, value in state_dict.items():
        assert not np.any((value == 0) | (value == 1)), name
    assert any((value < 0).any() for name, value in state_dict.items() if "bn1.weight" in name)
    np.testing.assert_equal(lively(4, 10, 0), state_dict)
    float32 = as_dtype(state_dict, np.float32)
    np.testing.assert_equal(as_dtype(float32, np.float64), state_dict)


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


def test_missing_counts_of_batches_are_zero(tmp_path, state_dict):
    file = tmp_path / "old.pth"
    old = {k: v for k, v in tensors(state_dict).items() if not k.endswith("num_batches_tracked")}
    torch.save(old, file)
    got = read(file)
    assert got.keys() == state_dict.keys()
    assert got["layer1.0.bn1.num_batches_tracked"] == 0


class Malicious:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_runs_nothing(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "weights.pt"
    torch.save({"conv1.weight": Malicious(victim)}, file)
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or is not a state dict: "):
        read(file)
    file.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or is not a state dict: "):
        read(file)
    assert not victim.exists()


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_damaged_file(tmp_path, state_dict, ending, part):
    file = tmp_path / f"weights{ending}"
    WRITERS[ending](tensors(state_dict), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"is damaged, or is not a state dict: ."):
        read(file)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "model": {}}])
def test_a_file_with_more_than_tensors(tmp_path, content):
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == (
        f"--state-dict {file} must hold only a dict of tensors by their names."
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


# Tensors that PyTorch saves and NumPy cannot hold.
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
        "must hold tensors of a dtype that NumPy can hold, got torch.bits8 for fc.weight.",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
# PyTorch warns when it makes kinds of tensors that it is going to remove.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_read(tmp_path, capsys, kind):
    make, text = UNREADABLE[kind]
    file = tmp_path / "weights.pt"
    torch.save({"bn1.weight": torch.ones(2), **make(torch.ones(10, 4))}, file)
    with pytest.raises(SystemExit) as error:
        main(["--state-dict", str(file)])
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: --state-dict {file} {text}\n"


def test_the_command_reports_a_missing_file(tmp_path, capsys):
    file = tmp_path / "none.pt"
    with pytest.raises(SystemExit) as error:
        main(["--state-dict", str(file)])
    # The exit status of argparse for a wrong option.
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: --state-dict {file} is not a file.\n"
