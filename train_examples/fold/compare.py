"""Train the digits network, fold it, and measure how the two differ."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.inference import fold_linen
from train_examples.common.config import Config
from train_examples.common.data import Dataset
from train_examples.common.model import ConvNet, no_norm
from train_examples.common.timing import alternate
from train_examples.common.training import fit, network

Tree = Any
BATCH_SIZES = (1, 64, 360)


class Comparison(NamedTuple):
    """The trained network and the folded one, in this order if there are two values.

    Attributes:
      difference: the largest difference between their logits.
      largest: the largest logit.
      accuracy: on the test set.
      values: the number of values in the variables.
      seconds: for each batch size, the times of every round.
    """

    difference: float
    largest: float
    accuracy: tuple[float, float]
    values: tuple[int, int]
    seconds: dict[int, tuple[list[float], list[float]]]


def run(config: Config) -> Comparison:
    """Train the network, or load it, as `config` says, and compare it with the folded one."""
    with jax.enable_x64(config.dtype == "float64"):
        model = network(config)
        state, _, dataset = fit(model, config)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return compare(model, variables, dataset)


def compare(
    model: ConvNet,
    variables: Tree,
    dataset: Dataset,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Comparison:
    """Compare a trained network with the folded one, on test images."""
    images, labels = dataset.test_images, dataset.test_labels
    networks = ((model, variables), folded(model, variables, images[:1]))
    trained_call, folded_call = (
        partial(jax.jit(partial(model.apply, train=False)), variables)
        for model, variables in networks
    )
    logits, folded_logits = np.asarray(trained_call(images)), np.asarray(folded_call(images))
    batches = {size: jnp.asarray(images[:size]) for size in batch_sizes if size <= len(images)}
    return Comparison(
        difference=float(np.abs(folded_logits - logits).max()),
        largest=float(np.abs(logits).max()),
        accuracy=(_accuracy(logits, labels), _accuracy(folded_logits, labels)),
        values=(_size(networks[0][1]), _size(networks[1][1])),
        seconds={
            size: alternate(partial(trained_call, batch), partial(folded_call, batch))
            for size, batch in batches.items()
        },
    )


def folded(model: ConvNet, variables: Tree, images: np.ndarray) -> tuple[ConvNet, Tree]:
    """Return the network without batch norms, and the variables that make it equal `model`.

    Args:
      model: the network.
      variables: its variables.
      images: a few images, on which the folded layers are checked.
    """
    variables = fold_linen(variables, model=model, example=images, train=False)
    return model.clone(norm=no_norm, use_bias=True), variables


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, -1) == labels))


def _size(variables: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables))
