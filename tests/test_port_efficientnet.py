"""EfficientNet-Lite0 from PyTorch: matched layers, equal classes, the command, what it refuses."""

import io
from functools import partial

import jax
import numpy as np
import pytest
import torch
from rich.console import Console

from jaxbn.parity import AccuracyReport, match_names
from jaxbn.parity._compare.accuracy_report import AccuracyRow
from tests.missing_package import assert_help_alone_works
from train_examples.common.errors import UserError
from train_examples.port_efficientnet import command, deploy
from train_examples.port_efficientnet.config import Config, parse_args
from train_examples.port_efficientnet.convert import to_flax
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.photographs import (
    CLASSES,
    SOURCES,
    darkened,
    load,
    normalized,
)
from train_examples.port_efficientnet.torch_model import batch_norms, pretrained

# One of seven stages, 4 of 49 batch norms, because compiling takes most of the time.
SMALL = {"stages": 1, "photographs": 3, "image_size": 48}
SMALL |= {"training_photographs": 3, "training_size": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return tmp_path_factory.mktemp("network") / "network.jax"


@pytest.fixture(scope="module")
def printed(exported):
    """Return the report of the command, on one line."""
    text = io.StringIO()
    command.run(Config(**SMALL, out=exported), Console(file=text, width=100))
    return " ".join(text.getvalue().split())


def test_the_whole_network_sees_the_same_classes():
    images = normalized(np.stack(list(load(2, 64).values())))
    theirs, model = pretrained(), EfficientNetLite0()
    names = match_names(model, theirs, images[:1])
    assert len(names) == len(["classifier"]) + 2 * len(batch_norms(theirs)) == 99
    assert names["stem/conv"] == "_conv_stem"
    assert names["block_1/expand/norm"] == "_blocks.1._bn0"
    assert names["block_15/project/conv"] == "_blocks.15._project_conv"
    with torch.no_grad():
        wanted = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    logits = jax.jit(partial(model.apply, train=False))(to_flax(theirs, model, names), images)
    assert command.distance(logits, wanted) <= command.FLOAT32_TOLERANCE
    assert CLASSES[int(np.argmax(logits[0]))] == "Egyptian cat"


def test_the_command_prints_each_step(printed):
    for text in (
        "│ 4 │ 0.99 │ 0.001 │ biased │ unbiased │",
        "matched and converted 9 layers",
        "│ rocket │",
        "│ training backward │",
        "folded: the logits differ by",
        "read back, its logits differ by",
        "│ the first recalibrated │",
        "┃ frozen, ┃ frozen, ┃ live, ┃ live, ┃",
        "variables differ after the last step by",
    ):
        assert text in printed


def test_the_exported_network_takes_any_number_of_images(printed, exported):
    size = SMALL["image_size"]
    for number in (1, 5):
        assert deploy.read(exported)(np.zeros((number, size, size, 3), np.float32)).shape == (
            number,
            1000,
        )


def test_a_file_is_written_whole_or_not(tmp_path):
    network = jax.jit(lambda images: images.sum((1, 2)))
    folder = tmp_path / "file"
    folder.write_bytes(b"old")
    with pytest.raises(UserError) as error:
        deploy.write(network, 2, folder / "network.jax")
    assert str(error.value) == f"--out {folder}/network.jax cannot be written: File exists."
    assert folder.read_bytes() == b"old"


@pytest.mark.parametrize("difference", [1e-6, np.nan])
def test_the_command_reports_where_the_frameworks_differ(monkeypatch, difference):
    rows = [AccuracyRow("training forward", "stem/norm", d, 1e-6, 1e-6) for d in (0, difference)]
    monkeypatch.setattr(command, "compare_accuracy", lambda *args: AccuracyReport(tuple(rows)))
    monkeypatch.setattr(command, "compare_models", lambda *args: "- stem/norm: epsilon")
    with pytest.raises(UserError) as error:
        command.compare(command.Ported(None, None, {}, {}), None, Console(file=io.StringIO()))
    assert str(error.value) == (
        "the frameworks differ in float64. In float32:\n- stem/norm: epsilon"
    )


def test_photographs():
    pixels = load(len(SOURCES), 32)
    assert len(pixels) == Config.photographs
    for name, photograph in pixels.items():
        assert photograph.shape == (32, 32, 3), name
        assert 0 <= photograph.min() < photograph.max() <= 1, name
    bounds = np.array([0.0, 127 / 255, 1.0])
    np.testing.assert_allclose(normalized(bounds), [-127 / 128, 0, 1], atol=1e-7)
    np.testing.assert_array_equal(darkened(bounds), bounds / 16)


def test_help_without_a_package():
    package = "efficientnet_lite_pytorch"
    module = "train_examples.port_efficientnet"
    assert_help_alone_works(module, package, "--training-size", "pretrained")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--stages 8", "--stages must be in [1, 7], got 8."),
        ("--photographs 17", "--photographs must be in [2, 16], got 17."),
        ("--training-photographs 1", "--training-photographs must be in [2, 16], got 1."),
        ("--image-size 31", "--image-size must be at least 32, got 31."),
        ("--out .", "--out . is a folder; it must be a file, or not exist yet."),
    ],
)
def test_options(argv, text, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert text in capsys.readouterr().err
