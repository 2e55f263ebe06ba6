"""EfficientNet-Lite0 from PyTorch: matched layers, equal classes, the command, what it refuses."""

import io
from functools import partial

import jax
import numpy as np
import pytest
import torch
from rich.console import Console

from jaxbn.parity import match_names
from tests.missing_package import assert_help_alone_works
from train_examples.common.errors import UserError
from train_examples.port_efficientnet import command, deploy
from train_examples.port_efficientnet.config import Config, parse_args
from train_examples.port_efficientnet.convert import to_flax
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.photographs import SOURCES, darkened, load, normalized
from train_examples.port_efficientnet.torch_model import batch_norms, pretrained

# Two of seven stages, each of a kind: 10 of 49 batch norms, and a fifth of the time to compile.
STAGES = 2
SMALL = {"stages": STAGES, "photographs": 3, "image_size": 48}
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
    images = normalized(np.stack(list(load(3, 96).values())))
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
    # Egyptian cat and espresso.
    np.testing.assert_array_equal(np.argmax(logits, -1)[:2], [285, 967])


def test_the_command_prints_each_step(printed):
    for text in (
        "│ 10 │ 0.99 │ 0.001 │ biased │ unbiased │",
        "matched and converted 21 layers",
        "│ rocket │",
        "│ training backward │",
        "folded, logits differ by",
        "read back, its logits differ by",
        "darkened to an eighth of the light, ",
        "of 3 photographs keep their class",
        "│ frozen, │ frozen, │ live, │ live, │",
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
    assert str(error.value) == f"--out {folder}/network.jax cannot be written: Not a directory."
    assert folder.read_bytes() == b"old"


def test_a_difference_in_one_layer_is_diagnosed(monkeypatch):
    theirs = pretrained(1)
    theirs._blocks[0]._bn2.eps = 0.1
    model = EfficientNetLite0(stages=1)
    images = normalized(np.stack(list(load(2, 32).values())))
    names = match_names(model, theirs, images)
    network = command.Ported(theirs, model, to_flax(theirs, model, names), names)
    with pytest.raises(UserError) as error:
        command.compare(network, images, Console(file=io.StringIO()))
    assert "block_0/project/norm: epsilon 0.001 against 0.1" in str(error.value)


def test_photographs():
    pixels = load(len(SOURCES), 32)
    assert len(pixels) == Config.photographs
    for name, photograph in pixels.items():
        assert photograph.shape == (32, 32, 3), name
        assert 0 <= photograph.min() < photograph.max() <= 1, name
    bounds = np.array([0.0, 127 / 255, 1.0])
    np.testing.assert_allclose(normalized(bounds), [-127 / 128, 0, 1], atol=1e-7)
    np.testing.assert_array_equal(darkened(bounds), bounds / 8)


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
