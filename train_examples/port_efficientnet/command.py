"""The steps of the command, from the weights in PyTorch to the exported file."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from rich.console import Console

from jaxbn.parity import compare_accuracy, compare_models, match_names
from train_examples.common.errors import UserError
from train_examples.port_efficientnet import deploy, tables
from train_examples.port_efficientnet.config import Config
from train_examples.port_efficientnet.convert import to_flax
from train_examples.port_efficientnet.fine_tune import Photographs, train_flax, train_torch
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.identify import conventions
from train_examples.port_efficientnet.photographs import load, normalized
from train_examples.port_efficientnet.recalibrate import agreements, top_1
from train_examples.port_efficientnet.torch_model import pretrained

# In float64, eps is 2e-16. Sums have up to some ten thousand terms, and each of 49 batch norms
# amplifies the rounding of those before it a few times, forward and backward.
FLOAT64_TOLERANCE = 1e-9
# For the logits in float32, in evaluation.
FLOAT32_TOLERANCE = 1e-4


class Ported(NamedTuple):
    """The network in both frameworks.

    Attributes:
      theirs: the network in PyTorch.
      model, variables: the network in Flax.
      names: the names in PyTorch of the layers in Flax.
    """

    theirs: torch.nn.Module
    model: EfficientNetLite0
    variables: Mapping[str, Any]
    names: Mapping[str, str]


def run(config: Config, console: Console) -> None:
    """Run all steps; raise a `UserError` at the first whose results differ."""
    pixels = load(config.photographs, config.image_size)
    images = normalized(np.stack(list(pixels.values())))
    few = load(config.training_photographs, config.training_size)
    few_images = normalized(np.stack(list(few.values())))

    theirs, model = pretrained(config.stages), EfficientNetLite0(config.stages)
    console.print(tables.of_conventions(conventions(theirs)))
    names = match_names(model, theirs, images[:1])
    network = Ported(theirs, model, to_flax(theirs, model, names), names)
    console.print(f"matched and converted {len(names)} layers\n")
    classify(network, images, list(pixels), console)
    compare(network, few_images, console)
    fold_and_export(network, images, config, console)
    all_pixels = np.stack(list(pixels.values()))
    console.print(
        tables.of_agreements(agreements(model, network.variables, all_pixels), len(pixels))
    )
    fine_tune(network, few_images, console)


def classify(network: Ported, images: np.ndarray, photographs: list[str], console: Console) -> None:
    """Print the class of each photograph in both frameworks."""
    with torch.no_grad():
        theirs = network.theirs(torch.tensor(images.transpose(0, 3, 1, 2))).softmax(1).numpy()
    ours = deploy.evaluation(network.model, network.variables)(images)
    ours = np.asarray(jax.nn.softmax(ours))
    console.print(tables.of_classes(photographs, theirs, ours))
    if np.any(top_1(ours) != top_1(theirs)):
        raise UserError("the frameworks see different classes.")


def compare(network: Ported, images: np.ndarray, console: Console) -> None:
    """Print the differences in float64, and the errors of both frameworks in float32."""
    both = (network.model, network.variables), network.theirs
    accuracy = compare_accuracy(*both, images, network.names)
    console.print(tables.of_accuracy(accuracy))
    # Written so that NaN counts as a difference.
    if not all(row.difference <= FLOAT64_TOLERANCE for row in accuracy.rows):
        report = compare_models(*both, images, network.names)
        raise UserError(f"the frameworks differ in float64. In float32:\n{report}")


def fold_and_export(network: Ported, images: np.ndarray, config: Config, console: Console) -> None:
    """Fold the network, time it, export it to a file, read it back and compare the logits."""
    whole = deploy.evaluation(network.model, network.variables)
    folded = deploy.folded(network.model, network.variables, images[:1])
    difference = distance(folded(images), whole(images))
    ratios = {n: deploy.speed_ratio(folded, whole, images[:n]) for n in (1, 4)}
    console.print(
        f"folded: the logits differ by {difference:.0e}. Evaluation takes {ratios[1]:.2f} times as "
        f"long as unfolded for 1 image, and {ratios[4]:.2f} times for 4"
    )
    deploy.write(folded, config.image_size, config.out)
    # The exported network takes any batch size, so it is called with another one.
    fewer = images[1:]
    back = distance(deploy.read(config.out)(fewer), folded(fewer))
    console.print(
        f"wrote {config.out}, {config.out.stat().st_size / 1e6:.1f} MB; read back, its logits "
        f"differ by {back:.0e}"
    )
    if not (difference <= FLOAT32_TOLERANCE and back <= FLOAT32_TOLERANCE):
        raise UserError("the folded or the exported network differs from the whole one.")


def fine_tune(network: Ported, images: np.ndarray, console: Console) -> None:
    """Train for a few steps in both frameworks, with frozen and live batch norms."""
    losses, differences = {}, {}
    with jax.enable_x64(True):
        # The photographs are numbered, and the networks learn the numbers.
        batch = Photographs(images.astype(np.float64), np.arange(len(images)))
        exact = copy.deepcopy(network.theirs).double()
        variables = to_flax(exact, network.model, network.names)
        for frozen in (True, False):
            name = "frozen" if frozen else "live"
            ours, after = train_flax(network.model, variables, batch, frozen)
            theirs, torch_model = train_torch(exact, batch, frozen)
            losses[name] = theirs, ours
            wanted = to_flax(torch_model, network.model, network.names)
            # NumPy's maximum, because Python's can ignore NaN.
            differences[name] = np.max(jax.tree.leaves(jax.tree.map(distance, after, wanted)))
    console.print(tables.of_losses(losses, differences))
    different = [name for name, d in differences.items() if not d <= FLOAT64_TOLERANCE]
    if different:
        raise UserError(f"training differs with {' and '.join(different)} batch norms.")


def distance(values: Any, truth: Any) -> float:
    """Return the largest difference of two arrays, relative to the largest value of the second."""
    # Subtract in float64: in float32 the subtraction would round as well.
    values, truth = np.asarray(values, np.float64), np.asarray(truth, np.float64)
    return float(np.max(np.abs(values - truth)) / np.max(np.abs(truth)))
