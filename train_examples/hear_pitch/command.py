"""The steps of the command: port the network, let both hear a tone, try to fold."""

import numpy as np
import torch
from flax import nnx

from jaxbn.convert import load_torch
from jaxbn.inference import fold_nnx
from jaxbn.parity import match_names
from train_examples.common.errors import UserError
from train_examples.hear_pitch.flax_model import Crepe
from train_examples.hear_pitch.sound import pitch, tone
from train_examples.hear_pitch.torch_model import pretrained

# Probabilities are at most 1. Float32 has an eps of 1e-7, and rounding passes through six layers.
TOLERANCE = 1e-5


def run(hertz: float) -> str:
    """Return what both networks hear; raise a `UserError` if they differ."""
    torch_model, model = pretrained(), Crepe(nnx.Rngs(0))
    frame = tone(hertz)
    load_torch(model, torch_model.state_dict(), match_names(model, torch_model, frame))
    with torch.no_grad():
        theirs = torch_model(torch.tensor(frame.transpose(0, 3, 1, 2))).numpy()[0]
    ours = np.asarray(nnx.jit(lambda model, x: model(x))(model, frame))[0]
    difference = float(np.abs(ours - theirs).max())
    if not difference <= TOLERANCE:
        raise UserError(f"the probabilities differ by {difference:.0e}.")
    return (
        f"a tone of {hertz:g} Hz: PyTorch hears {pitch(theirs):.2f} Hz, jaxbn {pitch(ours):.2f} "
        f"Hz; probabilities differ by {difference:.0e}\nfolding: {refusal(model, frame)}"
    )


def refusal(model: Crepe, frame: np.ndarray) -> str:
    """Return why the batch norms cannot be folded: a ReLU is between them and the convolutions."""
    try:
        fold_nnx(model, frame)
    except ValueError as error:
        return str(error)
    raise UserError("the batch norms were folded, though a ReLU is in between.")
