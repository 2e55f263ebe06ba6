"""The steps of the command: compare the frameworks, then fold and export the network."""

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.table import Table

from train_examples.common.errors import UserError
from train_examples.port_resnet import deploy
from train_examples.port_resnet.compare import Batch, Comparison, compare, distance, random_batch
from train_examples.port_resnet.config import WIDTH, Config
from train_examples.port_resnet.convert import CLASSES, check, size, to_flax
from train_examples.port_resnet.flax_model import ResNet18
from train_examples.port_resnet.weights import StateDict, as_dtype, lively, read

# In float64, eps is 2e-16. Sums have up to some thousand terms, and each of twenty layers amplifies
# the rounding of those before it a few times, forward and backward.
FLOAT64_TOLERANCE = 1e-10
# For a folded network, which is compared in float32 and in the forward pass alone.
FOLDED_TOLERANCE = 1e-4


def run(config: Config, console: Console) -> None:
    """Compare, fold and export the network; raise a `UserError` if the frameworks differ."""
    if config.state_dict is None:
        state_dict = lively(config.width or WIDTH, CLASSES, config.seed)
    else:
        state_dict = read(config.state_dict)
        check(state_dict)
    batch = random_batch(config.batch_size, config.image_size, size(state_dict)[1], config.seed)
    comparisons = compare(state_dict, batch)
    console.print(table(comparisons))
    # Written so that NaN counts as a difference.
    different = [k for k, c in comparisons.items() if not c.float64_difference <= FLOAT64_TOLERANCE]
    if different:
        raise UserError(f"the frameworks differ in float64: {', '.join(different)}.")
    fold_and_export(state_dict, batch, config, console)


def fold_and_export(state_dict: StateDict, batch: Batch, config: Config, console: Console) -> None:
    """Fold the network in float32, export it to a file, read it back and compare the logits."""
    variables = to_flax(as_dtype(state_dict, np.float32))
    images = np.asarray(batch.images, np.float32)
    whole = deploy.evaluation(ResNet18(*size(state_dict)), variables)
    model = ResNet18(*size(state_dict), folded=True)
    folded = deploy.evaluation(model, deploy.folded(variables))
    difference = distance([np.asarray(folded(images))], [np.asarray(whole(images))])
    console.print(
        f"folded {len(deploy.pairs(variables))} batch norms: logits differ by {short(difference)} "
        f"in float32; {deploy.milliseconds(folded, images):.1f} ms a batch, "
        f"{deploy.milliseconds(whole, images):.1f} ms before"
    )
    if not difference <= FOLDED_TOLERANCE:
        raise UserError("the folded network differs from the whole one.")

    deploy.write(folded, config.image_size, config.out)
    # The exported network takes any batch size, so it is called with another one.
    fewer = images[1:]
    exported, wanted = deploy.read(config.out)(fewer), folded(fewer)
    difference = distance([np.asarray(exported)], [np.asarray(wanted)])
    console.print(
        f"wrote {config.out}, {config.out.stat().st_size / 1e6:.1f} MB; read back, its logits of "
        f"{len(fewer)} images differ by {short(difference)}"
    )
    if not difference <= FOLDED_TOLERANCE:
        raise UserError("the exported network differs from the folded one.")


def table(comparisons: Mapping[str, Comparison]) -> Table:
    """Return the table of the comparisons, with one row for each kind of result."""
    rows = Table(
        title="Largest differences, relative to each array's largest value",
        caption="errors: differences from PyTorch's results in float64",
    )
    rows.add_column("")
    for name in ("float64\ndifference", "float32 error\nof PyTorch", "float32 error\nof jaxbn"):
        rows.add_column(name, justify="right")
    for name, comparison in comparisons.items():
        rows.add_row(name, *map(short, comparison))
    return rows


def short(difference: float) -> str:
    """Return a difference as short text."""
    return f"{difference:.0e}" if difference else "0"
