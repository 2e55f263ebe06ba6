"""The pitch network from PyTorch: equal outputs, the right pitch, folding refused, the command."""

import numpy as np
import pytest
import torch
from flax import nnx

from jaxbn.convert import load_torch
from jaxbn.parity import match_names
from tests.missing_package import assert_help_alone_works
from train_examples.common.errors import UserError
from train_examples.hear_pitch import command
from train_examples.hear_pitch.__main__ import main
from train_examples.hear_pitch.flax_model import Crepe
from train_examples.hear_pitch.sound import DISTANCE, pitch, tone
from train_examples.hear_pitch.torch_model import BINS, pretrained

CENTS_PER_OCTAVE = 1200


@pytest.fixture(scope="module")
def torch_model():
    return pretrained()


@pytest.fixture(scope="module")
def model(torch_model):
    model = Crepe(nnx.Rngs(0))
    names = match_names(model, torch_model, tone(440.0))
    load_torch(model, torch_model.state_dict(), names)
    return model


def heard_by_torch(torch_model, frame):
    with torch.no_grad():
        return torch_model(torch.tensor(frame.transpose(0, 3, 1, 2))).numpy()[0]


@pytest.mark.parametrize("hertz", [110.0, 440.0, 1000.0])
def test_both_networks_hear_a_tone(torch_model, model, hertz):
    frame = tone(hertz)
    theirs = heard_by_torch(torch_model, frame)
    ours = np.asarray(nnx.jit(lambda model, x: model(x))(model, frame))[0]
    # Probabilities are at most 1, and rounding passes through six layers.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=command.TOLERANCE)
    # The network resolves a bin.
    cents = CENTS_PER_OCTAVE * np.log2(pitch(ours) / hertz)
    assert abs(cents) <= DISTANCE


def test_pitch_is_the_mean_of_the_bins_around_the_largest():
    probabilities = np.zeros(BINS)
    probabilities[[100, 102, 300]] = 0.5, 0.5, 0.4
    between = np.zeros(BINS)
    between[101] = 1
    assert pitch(probabilities) == pytest.approx(pitch(between), rel=1e-12)
    # The bins of an octave.
    octave = np.roll(between, CENTS_PER_OCTAVE // int(DISTANCE))
    assert pitch(octave) == pytest.approx(2 * pitch(between), rel=1e-12)


def test_folding_is_refused(model):
    assert command.refusal(model, tone(440.0)) == (
        "model has 6 batch norms that cannot be folded: relu stands between layers/0/conv and "
        "layers/0/norm; relu stands between layers/1/conv and layers/1/norm; relu stands between "
        "layers/2/conv and layers/2/norm; and 3 more."
    )


def test_the_command(capsys):
    main(["--hertz", "220"])
    printed = capsys.readouterr().out
    assert printed.startswith("a tone of 220 Hz: PyTorch hears 220.86 Hz, jaxbn 220.86 Hz;")
    assert "folding: model has 6 batch norms that cannot be folded" in printed


def test_the_command_fails_where_the_networks_differ(monkeypatch):
    differing = pretrained()
    differing.conv6_BN.eps = 1.0
    monkeypatch.setattr(command, "pretrained", lambda: differing)
    with pytest.raises(UserError, match=r"the probabilities differ by \d"):
        command.run(440.0)


def test_help_without_a_package():
    assert_help_alone_works("train_examples.hear_pitch", "torchcrepe", "--hertz", "pretrained")
