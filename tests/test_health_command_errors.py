"""Checkpoints that `python -m jaxbn.health` cannot read, or that contain malicious code."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxbn.health.__main__ import main
from tests import checkpoints

LOOKED_FOR = "no layer has mean and var, or running_mean and running_var, or moving_mean and"
NOT_TENSORS = "and loading it could run code; save the model's state_dict() instead"


def assert_refused(capsys, path, text, *arguments):
    """Check that the command fails with this line alone, in which {} is the path."""
    assert main([str(path), *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"error: {text.format(path)}\n")


def write(folder, name, content=b""):
    (folder / name).write_bytes(content)
    return folder / name


class MakesADirectory:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def attack_zip(path, attack):
    torch.save({"bn.running_mean": attack}, path)


def attack_before_zip(path, attack):
    torch.save({"bn.running_mean": attack}, path, _use_new_zipfile_serialization=False)


def attack_pickle(path, attack):
    path.write_bytes(pickle.dumps(attack))


def attack_array(path, attack):
    with path.open("wb") as file:
        np.save(file, np.array([attack], object), allow_pickle=True)


DAMAGED = "{} is damaged or was not written by torch.save"
CALLS_MKDIR = f"{{}} contains more than tensors ({os.mkdir.__module__}.mkdir), {NOT_TENSORS}"


@pytest.mark.parametrize("suffix", ["pt", "npy", "npz", "safetensors"])
@pytest.mark.parametrize(
    "write_attack, text",
    [
        (attack_zip, CALLS_MKDIR),
        (attack_before_zip, CALLS_MKDIR),
        (attack_pickle, DAMAGED),
        (attack_array, DAMAGED),
    ],
    ids=["zip", "before zip", "pickle", "array"],
)
def test_code_in_a_file_is_not_run(write_attack, text, suffix, capsys, tmp_path):
    made = tmp_path / "made by the attack"
    attack = MakesADirectory(made)
    path = tmp_path / f"weights.{suffix}"
    write_attack(path, attack)
    if suffix == "safetensors":
        header = "{} is not a readable safetensors file: Error while deserializing header"
        assert main([str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {header.format(path)}: ")
    else:
        assert_refused(capsys, path, text)
    assert not made.exists()
    # The attack works if the pickle is loaded.
    pickle.loads(pickle.dumps(attack))
    assert made.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_whole_modules_are_not_loaded(capsys, tmp_path):
    layer = torch.nn.BatchNorm1d(3)
    torch.save(layer, tmp_path / "module.pt")
    torch.jit.save(torch.jit.script(layer), tmp_path / "script.pt")
    names = {"module": "torch.nn.modules.batchnorm.BatchNorm1d", "script": "TorchScript"}
    for file, name in names.items():
        text = f"{{}} contains more than tensors ({name}), {NOT_TENSORS}"
        assert_refused(capsys, tmp_path / f"{file}.pt", text)


def test_a_version_of_pytorch_that_runs_code_is_not_used(capsys, tmp_path, monkeypatch):
    path, _ = checkpoints.torch_file(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert_refused(
        *(capsys, path),
        "PyTorch 2.9.1+cu128 may run code contained in {}, but version 2.10 does not: pip install "
        "'torch>=2.10'",
    )


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("empty.pt", b"", "{} is empty"),
        ("empty.safetensors", b"", "{} is empty"),
        ("text.pt", b"hello\n", DAMAGED),
        (
            "text.safetensors",
            b"hello, hello\n",
            "{} is not a readable safetensors file: Error while deserializing header: header too "
            "large",
        ),
    ],
)
def test_files_that_are_something_else(name, content, text, capsys, tmp_path):
    assert_refused(capsys, write(tmp_path, name, content), text)


def test_truncated_files(capsys, tmp_path):
    whole = checkpoints.safetensors_torch(tmp_path)[0].read_bytes()
    assert_refused(
        *(capsys, write(tmp_path, "x.safetensors", whole[:-1])),
        "{} is not a readable safetensors file: Error while deserializing header: incomplete "
        "metadata, file not fully covered",
    )
    whole = checkpoints.torch_file(tmp_path)[0].read_bytes()
    assert_refused(
        *(capsys, write(tmp_path, "x.pt", whole[: len(whole) // 2])),
        "{} is not a readable PyTorch file: PytorchStreamReader failed reading zip archive: failed "
        "finding central directory",
    )


def test_paths(capsys, tmp_path, monkeypatch):
    assert_refused(capsys, tmp_path / "no", "cannot read {}: No such file or directory")
    file = write(tmp_path, "weights.pt", b"x")
    assert_refused(capsys, file / "no", "cannot read {}: Not a directory")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(capsys, tmp_path / "pipe", "{} is neither a file nor a directory")
    assert_refused(capsys, file, "{} is a file, which has no steps: leave out --step", "--step=1")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # The superuser can read every file, so refusal is simulated.
    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(capsys, file, "cannot read {}: Permission denied")
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert_refused(capsys, tmp_path, "cannot read {}: Permission denied")


def test_directories_that_are_not_checkpoints(capsys, tmp_path):
    text = "{} is not an Orbax checkpoint: neither it nor a directory in it has a _METADATA file"
    assert_refused(capsys, tmp_path, text)
    (tmp_path / "10").mkdir()
    assert_refused(capsys, tmp_path, text.format(tmp_path / "10"))
    path, _ = checkpoints.orbax_nnx(tmp_path)
    assert_refused(capsys, path, "{} has no steps: leave out --step", "--step=1")
    (path / "_METADATA").write_text("{")
    assert_refused(
        *(capsys, path),
        "{} is not a readable Orbax checkpoint: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    )


def test_a_damaged_directory(tmp_path):
    path, _ = checkpoints.orbax_nnx(tmp_path)
    shutil.rmtree(path / "d")
    # In a separate process, since Orbax reports errors from its own threads.
    run = subprocess.run(
        [sys.executable, "-m", "jaxbn.health", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"error: {path} is not a readable Orbax checkpoint: NOT_FOUND: ")


def test_no_batch_norms(capsys, tmp_path):
    text = f"{{}} has no batch norms: {LOOKED_FOR} moving_variance"
    ones = torch.ones(3)
    for name, saved in (("tensor", ones), ("norm", {"weight": ones, "mean": ones})):
        torch.save(saved, tmp_path / f"{name}.pt")
        assert_refused(capsys, tmp_path / f"{name}.pt", text)
    torch.save({"bn.running_mean": ones, "bn.running_var": ones[:2]}, tmp_path / "bn.pt")
    skipped = "; skipped bn: running_mean has shape (3,), but running_var has (2,)"
    assert_refused(capsys, tmp_path / "bn.pt", text + skipped)
    variables, _ = checkpoints.linen_variables()
    checkpoints.save_standard(tmp_path / "params", variables["params"])
    assert_refused(capsys, tmp_path / "params", text)


def test_tensors_without_values(capsys, tmp_path):
    tensors = {"meta": torch.ones(3, device="meta"), "Sparse": torch.ones(3).to_sparse()}
    for name, tensor in tensors.items():
        torch.save({"bn.running_mean": tensor, "bn.running_var": tensor}, tmp_path / name)
        assert main([str(tmp_path / name)]) == 2
        start = f"error: {tmp_path / name} is not a readable PyTorch file: "
        error = capsys.readouterr().err
        assert error.startswith(start) and name in error and error.count("\n") == 1


def test_a_mapping_that_contains_itself(capsys, tmp_path):
    tensors = {"bn": {"running_mean": torch.zeros(3), "running_var": torch.full((3,), 2.0)}}
    tensors["list"] = [tensors]
    torch.save(tensors, tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), "--json"]) == 0
    assert capsys.readouterr().out.count('"path"') == 1


@pytest.mark.parametrize(
    "save, modules, text",
    [
        (
            checkpoints.orbax_nnx,
            ["orbax", "orbax.checkpoint"],
            "orbax-checkpoint is needed to read the directory {}: pip install 'jaxbn[health]'",
        ),
        (
            checkpoints.safetensors_flax,
            ["safetensors"],
            "safetensors is needed to read {}: pip install 'jaxbn[health]'",
        ),
        (
            checkpoints.torch_file,
            ["torch"],
            "PyTorch is needed to read {}, which is neither a directory nor a .safetensors file: "
            "pip install torch",
        ),
    ],
)
def test_packages_that_read_may_be_missing(save, modules, text, capsys, tmp_path, monkeypatch):
    path, _ = save(tmp_path)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    assert_refused(capsys, path, text)


def test_packages_that_show_may_be_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, package in (([], "rich"), (["--json", "--png", "x.png"], "matplotlib")):
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path), *arguments])
        assert capsys.readouterr().err.endswith(
            f"error: {package} is missing: pip install 'jaxbn[health]', or use --json without "
            f"--png\n"
        )


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--png", "no/x.png"], "argument --png: cannot write to no/x.png: No such file or"),
        (["--png", "x.abc"], "argument --png: x.abc ends in .abc, which Matplotlib cannot write"),
        (["--epsilon=-1"], "argument --epsilon: -1 is not a finite number of at least 0\n"),
        (["--epsilon=nan"], "argument --epsilon: nan is not a finite number of at least 0\n"),
        (["--epsilon=x"], "argument --epsilon: x is not a finite number of at least 0\n"),
        (["--step=x"], "argument --step: invalid int value: 'x'\n"),
    ],
)
def test_wrong_arguments_are_refused_before_reading(arguments, text, capsys, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr("jaxbn.health.__main__.read", read)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["weights.pt", *arguments])
    assert f"error: {text}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
