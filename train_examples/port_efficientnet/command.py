"""The steps of the command, from the weights in PyTorch to the exported file."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from rich.console import Console

from train_examples.common.errors import UserError
from train_examples.port_efficientnet import deploy, tables
from train_examples.port_efficientnet.compare import differences, distance, float32_errors, in_dtype
from train_examples.port_efficientnet.config import Config
from train_examples.port_efficientnet.convert import to_flax
from train_examples.port_efficientnet.fine_tune import train_flax, train_torch
from train_examples.port_efficientnet.identify import conventions
from train_examples.port_efficientnet.photographs import load, normalized
from train_examples.port_efficientnet.recalibrate import agreement
from train_examples.port_efficientnet.torch_model import pretrained

# In float64, eps is 2e-16. Sums have up to some ten thousand terms, and each of 49 batch norms
# amplifies the rounding of those before it.
FLOAT64_TOLERANCE = 1e-9
# For logits in float32, in evaluation.
FLOAT32_TOLERANCE = 1e-4


def run(config: Config, console: Console) -> None:
    """Run all steps; raise a `UserError` at the first whose results differ."""
    torch_model = pretrained()
    console.print(tables.of_conventions(conventions(torch_model)))
    variables = to_flax(torch_model.state_dict())

    pixels = load(config.photographs, config.image_size)
    images = normalized(np.stack(list(pixels.values())))
    classify(variables, torch_model, images, list(pixels), console)
    fold_and_export(variables, images, config, console)
    before, after = agreement(variables, np.stack(list(pixels.values())))
    console.print(
        f"darkened to an eighth of the light, {before} of {len(pixels)} photographs keep their "
        f"class; with statistics recalibrated on them, {after}"
    )

    few = load(config.training_photographs, config.training_size)
    images = normalized(np.stack(list(few.values())))
    compare(variables, torch_model, images, console)
    fine_tune(variables, torch_model, images, console)


def classify(
    variables: Mapping[str, Any],
    torch_model: torch.nn.Module,
    images: np.ndarray,
    photographs: list[str],
    console: Console,
) -> None:
    """Print the class of each photograph in both frameworks."""
    ours = jax.nn.softmax(deploy.whole(variables)(images))
    with torch.no_grad():
        theirs = torch_model(torch.tensor(images.transpose(0, 3, 1, 2))).softmax(1)
    ours, theirs = np.asarray(ours), theirs.numpy()
    console.print(tables.of_classes(photographs, theirs, ours))
    if np.any(ours.argmax(-1) != theirs.argmax(-1)):
        raise UserError("the frameworks see different classes.")


def compare(
    variables: Mapping[str, Any],
    torch_model: torch.nn.Module,
    images: np.ndarray,
    console: Console,
) -> None:
    """Print the differences in both precisions, and which framework loses how many digits."""
    columns = {
        dtype: differences(variables, torch_model, images, dtype)
        for dtype in ("float64", "float32")
    }
    console.print(tables.of_differences(columns))
    console.print(tables.of_errors(float32_errors(variables, torch_model, images)))
    # Written so that NaN counts as a difference.
    different = [k for k, v in columns["float64"].items() if not v <= FLOAT64_TOLERANCE]
    if different:
        raise UserError(f"the frameworks differ in float64: {', '.join(different)}.")


def fold_and_export(
    variables: Mapping[str, Any], images: np.ndarray, config: Config, console: Console
) -> None:
    """Fold the network, time it, export it to a file, read it back and compare the logits."""
    whole, folded = deploy.whole(variables), deploy.folded(variables)
    difference = distance(np.asarray(folded(images)), np.asarray(whole(images)))
    ratios = {n: deploy.speed_ratio(folded, whole, images[:n]) for n in (1, 4)}
    times = " and ".join(f"{ratio:.2f} for {n}" for n, ratio in ratios.items())
    console.print(
        f"folded, logits differ by {difference:.0e}; the time is that of the whole network times "
        f"{times} images"
    )
    deploy.write(folded, config.image_size, config.out)
    # The exported network takes any batch size, so it is called with another one.
    fewer = images[1:]
    exported = np.asarray(deploy.read(config.out)(fewer))
    back = distance(exported, np.asarray(folded(fewer)))
    console.print(
        f"wrote {config.out}, {config.out.stat().st_size / 1e6:.1f} MB; read back, its logits "
        f"differ by {back:.0e}"
    )
    if not max(difference, back) <= FLOAT32_TOLERANCE:
        raise UserError("the folded or the exported network differs from the whole one.")


def fine_tune(
    variables: Mapping[str, Any],
    torch_model: torch.nn.Module,
    images: np.ndarray,
    console: Console,
) -> None:
    """Print the losses of a few steps in both frameworks, with frozen and live batch norms."""
    labels = np.arange(len(images))
    with jax.enable_x64(True):
        ours, _, images = in_dtype(variables, torch_model, images, "float64")
        runs = {
            "frozen" if frozen else "live": (
                train_torch(torch_model, images, labels, frozen),
                train_flax(ours, images, labels, frozen),
            )
            for frozen in (True, False)
        }
    console.print(tables.of_losses(runs))
