"""What `python -m jaxbn.parity` prints, in each form."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import jaxbn
from jaxbn.parity import _oracle
from jaxbn.parity.__main__ import main
from jaxbn.parity._command import measurements, tables
from jaxbn.parity._command.frameworks import FRAMEWORKS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    inputs = {name: x[:64, :3] for name, x in measurements.representative().items()}
    monkeypatch.setattr(measurements, "representative", lambda: inputs)
    monkeypatch.setattr(measurements, "N", 64)
    monkeypatch.setattr(measurements, "C", 3)


def printed(capsys, *arguments):
    main([*arguments, "--device", "cpu"])
    return capsys.readouterr().out


def test_json(capsys):
    found = json.loads(printed(capsys, "--json", "--frameworks", "torch,haiku,equinox-ema"))
    conventions = found["conventions"]
    assert list(conventions) == ["jaxbn", "PyTorch", "Haiku", "Equinox, ema"]
    for name in ("jaxbn", "PyTorch"):
        assert conventions[name] == {**jaxbn.PYTORCH, "note": None}
    assert conventions["Haiku"] == {**jaxbn.FLAX, "note": "averages bias-corrected"}
    note = conventions["Equinox, ema"].pop("note")
    assert note.startswith("running mean: successive batches") and not conventions["Equinox, ema"]
    assert found["errors"]["Equinox, ema"] is None
    for name in ("jaxbn", "PyTorch", "Haiku"):
        assert list(found["errors"][name]) == list(measurements.INPUTS)
        assert max(found["errors"][name]["N(0, 1)"].values()) < 2e-6
    # With a mean of 1e6, PyTorch loses digits, and this library does not.
    assert max(found["errors"]["jaxbn"]["N(1e6, 1)"].values()) < 2e-6
    assert min(found["errors"]["PyTorch"]["N(1e6, 1)"].values()) > 1e-4
    assert (found["missing"], found["dtype"], found["shape"]) == ({}, "float32", [64, 3])


def test_float64(capsys):
    found = json.loads(printed(capsys, "--json", "--frameworks", "torch,linen", "--dtype=float64"))
    for name, convention in (("jaxbn", jaxbn.PYTORCH), ("flax.linen", jaxbn.FLAX)):
        assert found["conventions"][name] == {**convention, "note": None}
        assert max(found["errors"][name]["N(0, 1)"].values()) < 1e-14


def test_bfloat16(capsys):
    found = json.loads(printed(capsys, "--json", "--frameworks", "torch", "--dtype=bfloat16"))
    for name in ("jaxbn", "PyTorch"):
        # Half of the last place of bfloat16.
        assert 1e-5 < found["errors"][name]["N(0, 1)"]["y"] < 2**-8


def test_markdown(capsys):
    text = printed(capsys, "--markdown", "--frameworks", "torch")
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("|")
    ]
    conventions, *errors = tables
    assert conventions[0] == [
        *("layer", "momentum", "epsilon"),
        *("batch_variance", "running_variance", "note"),
    ]
    assert conventions[2][:5] == ["jaxbn", "0.9", "1e-05", "biased", "unbiased"]
    assert conventions[3][:5] == ["PyTorch", "0.9", "1e-05", "biased", "unbiased"]
    assert len(errors) == 3
    for table in errors:
        assert table[0] == ["input", "jaxbn", "PyTorch"]
        assert [row[0] for row in table[2:]] == list(measurements.INPUTS)
        for row in table[2:]:
            assert all(float(cell) >= 0 for cell in row[1:])
    assert "On cpu: jaxbn " in text


def test_terminal_and_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "errors.png"
    text = printed(capsys, "--frameworks", "", "--png", str(path))
    assert "momentum  epsilon  batch_variance  running_variance" in text
    assert "one spike of 1e6" in text
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_an_ending_is_a_png(capsys, tmp_path):
    printed(capsys, "--json", "--frameworks", "", "--png", str(tmp_path / "errors"))
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing/errors.png", "cannot write to {path}: No such file or directory"),
        ("folder.png", "cannot write to {path}: Is a directory"),
        ("file/errors.png", "cannot write to {path}: Not a directory"),
        ("errors.xyz", "{path} ends in .xyz, which Matplotlib cannot write; it writes "),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_probing(
    name, message, capsys, tmp_path, monkeypatch
):
    def measure(*_):
        raise AssertionError("probed")

    monkeypatch.setattr("jaxbn.parity.__main__.measure_frameworks", measure)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    path = tmp_path / name
    with pytest.raises(SystemExit, match="2"):
        main(["--json", "--device", "cpu", "--png", str(path)])
    assert f"error: argument --png: {message.format(path=path)}" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_framework_is_a_remark(capsys, monkeypatch):
    makers = {name: FRAMEWORKS[name] for name in ("ours", "haiku")}
    for module in ("jaxbn.parity.__main__", "jaxbn.parity._command.frameworks"):
        monkeypatch.setattr(f"{module}.FRAMEWORKS", makers)
    monkeypatch.setitem(sys.modules, "haiku", None)
    assert printed(capsys, "--markdown").endswith(
        "Left out: Haiku (haiku is not installed).\n\n"
        "pip install 'jaxbn[frameworks]' installs every framework.\n"
    )


def test_a_missing_framework_that_was_asked_for_is_an_error(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "haiku", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--json", "--device", "cpu", "--frameworks", "haiku,linen"])
    assert capsys.readouterr().err.endswith(
        "error: cannot measure Haiku (haiku is not installed): pip install 'jaxbn[frameworks]' "
        "installs every framework\n"
    )


def test_80_columns_are_enough(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    errors = {name: dict.fromkeys(measurements.RESULTS, 1e-7) for name in measurements.INPUTS}
    titles = [title for title, _ in FRAMEWORKS.values()]
    note = "running mean: successive batches have weights that are not constant " * 3
    measured = {
        **{"device": "cpu", "dtype": "bfloat16", "shape": [4096, 16], "missing": {}},
        "versions": dict.fromkeys(titles, "0.10.2"),
        "conventions": {title: {**jaxbn.PYTORCH, "note": note} for title in titles},
        "errors": dict.fromkeys(titles, errors),
    }
    tables.show(measured)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    words = text.split()
    # Once in each table of errors, whose head has line breaks after spaces and dots.
    for part in {part for title in titles for part in re.findall(r"[^\s.]+\.?", title)}:
        assert words.count(part) >= 3, part


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--frameworks", " torch , tf"], "unknown frameworks tf; there are torch, linen, nnx"),
        (["--json", "--markdown"], "not allowed with argument"),
        (["--dtype", "int8"], "invalid choice"),
        (["--json", "--device", "abacus"], "no device 'abacus': "),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_packages_for_tables_and_pictures_may_be_missing(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, package in (([], "rich"), (["--json", "--png", "x.png"], "matplotlib")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert f"{package} is missing: pip install 'jaxbn[parity]'" in capsys.readouterr().err


def test_the_module_runs():
    run = subprocess.run(
        [sys.executable, "-m", "jaxbn.parity", "--help"], capture_output=True, text=True, check=True
    )
    assert "--frameworks" in run.stdout


def test_errors_that_are_not_numbers():
    assert np.isnan(_oracle.error(np.full(2, np.nan), np.ones(2)))
    assert _oracle.error(np.full(2, 0.5), np.zeros(2)) == 0.5
