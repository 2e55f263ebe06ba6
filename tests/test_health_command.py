"""What `python -m jaxbn.health` finds in checkpoints, and how it shows it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from jaxbn.health.__main__ import main
from jaxbn.health._command import load
from tests import checkpoints

EPSILON = 1e-5
DEV = "|mean|/std"


def found(capsys, *arguments, status=0):
    """Run the command, and return the object that it prints."""
    assert main([*map(str, arguments), "--json"]) == status

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def planted(capsys, folder, layers, *arguments):
    """Return the (path, code) of the findings in a file with these layers, and the whole report."""
    path = checkpoints.save_statistics(folder / "planted.safetensors", layers)
    report = found(capsys, path, *arguments, status=1)
    return [(f["path"], f["code"]) for f in report["findings"]], report


@pytest.mark.parametrize("save", checkpoints.FORMATS, ids=lambda save: save.__name__)
def test_every_format(save, capsys, tmp_path):
    path, norms = save(tmp_path)
    report = found(capsys, path)
    assert (report["checkpoint"], report["epsilon"]) == (str(path), EPSILON)
    assert (report["findings"], report["skipped"]) == ([], [])
    # Layer 2 comes before layer 10.
    assert [layer["path"] for layer in report["layers"]] == list(norms)
    for layer, norm in zip(report["layers"], norms.values(), strict=True):
        mean, var = (np.asarray(norm[name], np.float64) for name in ("mean", "var"))
        assert layer["shape"][-1] == mean.size
        assert layer["mean"] == [mean.min(), mean.max()]
        assert layer["var"] == [var.min(), var.max()]
        ratio = np.abs(mean) / np.sqrt(var + EPSILON)
        # The same three operations in float64, in any order.
        assert layer["mean_in_deviations"] == pytest.approx([ratio.min(), ratio.max()], rel=1e-15)
        counted = checkpoints.BATCHES if save in checkpoints.COUNTING else None
        assert layer["batches"] == counted
        assert (layer["not_finite"], layer["negative"], layer["below_epsilon"]) == (0, 0, 0)


def test_steps(capsys, tmp_path):
    path, _ = checkpoints.orbax_manager(tmp_path)
    assert found(capsys, path)["step"] == 10
    earlier = found(capsys, path, "--step", "9", status=1)
    assert earlier["step"] == 9
    assert {f["code"] for f in earlier["findings"]} == {"dead-features"}
    assert main([str(path), "--step", "8"]) == 2
    assert capsys.readouterr().err == f"error: {path} has no step 8; it has 9, 10\n"


def test_names_of_steps_and_unfinished_steps(tmp_path):
    for name in ("ckpt_2", "step_00010", "30.orbax-checkpoint-tmp-40", "notes"):
        (tmp_path / name).mkdir()
    assert load.orbax_directory.find_step(tmp_path, None) == (10, tmp_path / "step_00010")


def test_planted_faults(capsys, tmp_path):
    sound = ([0.5, -1, 2], [0.3, 1, 2])
    layers = {
        "dead": ([0, 0, 1], [1e-9, 0, 1]),
        "inf": ([np.inf, 1, 2], [1, 2, np.nan]),
        "nan": ([np.nan] * 3, [np.nan] * 3),
        "negative": ([0, 1, 2], [1, -0.25, 2]),
        "new": ([0, 0, 0], [1, 1, 1]),
        "sound": sound,
    }
    findings, report = planted(capsys, tmp_path, layers)
    assert findings == [
        ("dead", "dead-features"),
        ("inf", "non-finite"),
        ("inf", "non-finite"),
        ("nan", "non-finite"),
        ("nan", "non-finite"),
        ("negative", "negative-variance"),
        ("new", "never-updated"),
    ]
    by_path = {layer["path"]: layer for layer in report["layers"]}
    assert by_path["nan"]["mean"] is by_path["nan"]["var"] is None
    assert by_path["nan"]["mean_in_deviations"] is None
    assert by_path["inf"]["mean"] == [1, 2] and by_path["inf"]["var"] == [1, 2]
    assert [by_path[name]["not_finite"] for name in layers] == [0, 2, 3, 0, 0, 0]
    assert [by_path[name]["negative"] for name in layers] == [0, 0, 0, 1, 0, 0]
    assert [by_path[name]["below_epsilon"] for name in layers] == [2, 0, 0, 0, 0, 0]
    assert report["findings"][0]["text"] == (
        "The running variance of 2 of 3 features (the first: 0) is below epsilon (1e-05). These "
        "inputs are almost constant, and the layer divides them by sqrt(epsilon) instead of their "
        "standard deviation. Look for dead units, or for pruned or zero-initialized channels, in "
        "the layer before. If the inputs are small on purpose, use a smaller epsilon."
    )


def test_epsilon(capsys, tmp_path):
    layers = {"bn": ([0, 0.25], [0.0009, 0.0025])}
    path = checkpoints.save_statistics(tmp_path / "small.safetensors", layers)
    assert found(capsys, path)["findings"] == []
    report = found(capsys, path, "--epsilon", "0.002", status=1)
    assert report["layers"][0]["below_epsilon"] == 1
    # The variance is rounded to float32 in the file.
    expected = [0, 0.25 / np.sqrt(0.0025 + 0.002)]
    assert report["layers"][0]["mean_in_deviations"] == pytest.approx(expected, rel=2**-24)


@pytest.mark.parametrize(
    "count, text",
    [
        (
            (),
            ". Unless the checkpoint was saved before training, no training step has updated them, "
            "and in evaluation the layer does not normalize. To update them, call model.train().",
        ),
        (
            (0,),
            ", and num_batches_tracked is 0. Unless the checkpoint was saved before training, no "
            "training step has updated them, and in evaluation the layer does not normalize. To "
            "update them, call model.train().",
        ),
        (
            (7,),
            ", although num_batches_tracked is 7. Either the momentum prevents any update (0 in "
            "PyTorch, 1 in Flax and jaxbn), or the statistics were reset without their count. In "
            "evaluation, the layer does not normalize.",
        ),
    ],
)
def test_the_count_says_why_statistics_are_as_initialized(count, text, capsys, tmp_path):
    _, report = planted(capsys, tmp_path, {"bn": ([0, 0], [1, 1], *count)})
    start = "The running mean is 0 and the running variance is 1 in all features, as initialized"
    assert [f["text"] for f in report["findings"]] == [start + text]
    assert report["layers"][0]["batches"] == (count[0] if count else None)


def test_converted_statistics_need_no_count(capsys, tmp_path):
    layers = {"bn": ([0.5, 1], [2, 3], 0)}
    path = checkpoints.save_statistics(tmp_path / "converted.safetensors", layers)
    assert found(capsys, path)["findings"] == []


def test_the_table_fits_a_terminal_and_faults_are_told_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers = {f"net.layer{k}.bn": ([0, 0], [1, 1]) for k in range(53)}
    layers["net.layer11.bn"] = ([-0.95, np.nan], [0.011, 1900])
    path = checkpoints.save_statistics(tmp_path / "x.safetensors", layers)
    assert main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = [line.split() for line in lines]
    assert ["layer11.bn", "2", "-0.95", "0.011..1900", "9.1", "1", "not", "finite"] in words
    assert words.index(["layer2.bn", "2", "0", "1", "0", "never", "updated"]) < words.index(
        ["layer10.bn", "2", "0", "1", "0", "never", "updated"]
    )
    text = " ".join(" ".join(lines).split())
    assert text.count("as initialized") == 1
    assert (
        "never-updated: net.layer0.bn, net.layer1.bn, net.layer2.bn, net.layer3.bn and 48 more"
    ) in text
    assert "non-finite: net.layer11.bn The running mean of 1 of 2 features" in text


def test_a_sound_checkpoint_in_the_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    path, _ = checkpoints.orbax_manager(tmp_path)
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"2 batch norms in {path}, step 10"
    assert lines[2].split() == ["layer", "in", "batch_stats/", "shape", "mean", "variance", DEV]
    assert (
        lines[-1]
        == "The statistics show no faults. To compare them with data, use jaxbn.health.check."
    )


def test_what_is_not_a_batch_norm(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    ones = torch.ones(3)
    tensors = {
        "\x1b[31mbn.running_mean": ones,
        "\x1b[31mbn.running_var": ones + 1,
        "loss": {"mean": torch.tensor(0.0), "var": torch.tensor(1.0)},
        "opt_state": {"mu": {"bn": {"mean": 0 * ones, "var": ones}}},
        "image.mean": ones,
        "shapes.running_mean": ones,
        "shapes.running_var": torch.ones(4),
        "whole.running_mean": ones.int(),
        "whole.running_var": ones,
    }
    torch.save(tensors, tmp_path / "other.pt")
    assert main([str(tmp_path / "other.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    # The name of a layer cannot control the terminal.
    assert [line.split()[0] for line in lines if "0.71" in line] == [r"\x1b[31mbn"]
    assert [line for line in lines if line.startswith("Skipped")] == [
        "Skipped shapes: running_mean has shape (3,), but running_var has (4,).",
        "Skipped whole: running_mean has dtype int32, which is not floating.",
    ]


@pytest.mark.parametrize("layers", [1, 5, 53])
def test_picture(layers, capsys, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"layer{k}.bn" for k in range(layers)]
    norms = {name: (rng.normal(size=16), rng.uniform(0.5, 2, 16)) for name in names}
    del norms["layer0.bn"]
    # Matplotlib would parse this as mathematics.
    norms[r"$\frac$"] = (np.full(16, np.nan), np.ones(16))
    path = checkpoints.save_statistics(tmp_path / "x.safetensors", norms)
    found(capsys, path, "--png", tmp_path / "x", status=1)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_the_largest_numbers_and_of_none(capsys, tmp_path):
    largest = torch.tensor([np.finfo(np.float64).max, 0], dtype=torch.float64)
    for mean in (largest, largest[:0]):
        norm = {"bn.running_mean": mean, "bn.running_var": torch.ones_like(mean)}
        torch.save(norm, tmp_path / "x.pt")
        report = found(capsys, tmp_path / "x.pt", "--epsilon=0", "--png", tmp_path / "x.png")
        assert report["layers"][0]["mean_in_deviations"] == ([0, mean.max()] if len(mean) else None)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "x.png").unlink()


def test_what_the_picture_shows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    layers = {
        "a": ([-4, 0, 1, 2, 30], [1, 1, 1, 1, 1]),
        "b": ([np.nan] * 5, [1] * 5),
        "c": ([0] * 5, [1] * 5),
    }
    path = checkpoints.save_statistics(tmp_path / "x.safetensors", layers)
    assert main([str(path), "--json", "--epsilon", "0", "--png", str(tmp_path / "x.png")]) == 1
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_title() == f"3 batch norms in {path}"
    assert axes.get_xscale() == "symlog"
    whole, median = axes.lines[:2]
    assert (list(whole.get_xdata()), list(median.get_xdata())) == ([-4, 30], [1])
    box = axes.patches[0]
    assert (box.get_x(), box.get_width()) == (0, 2)
    (notes,) = axes.child_axes
    assert [label.get_text() for label in notes.get_yticklabels()] == [
        *("", "5 not finite", "never updated")
    ]


def test_the_module_runs_where_the_devices_of_the_run_are_not(tmp_path):
    path, norms = checkpoints.orbax_sharded(tmp_path)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "jaxbn.health", path.name, "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    report = json.loads(run.stdout)
    assert [layer["path"] for layer in report["layers"]] == list(norms)
    assert [layer["shape"] for layer in report["layers"]] == [[8, 6], [8, 4]]
