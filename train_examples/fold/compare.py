"""Trains, folds, and measures what differs: outputs, accuracy, time and size."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import turn_by_turn
from jaxbn.inference import fold_linen
from train_examples.digits import data
from train_examples.digits.config import Config
from train_examples.digits.model import ConvNet, no_norm
from train_examples.digits.train import network, train

Tree = Any
BATCH_SIZES = (1, 64, 360)


class Comparison(NamedTuple):
    """The trained network and the folded one, in this order where there are two values.

    Attributes:
      difference: the largest between their logits.
      largest: the largest logit.
      accuracy: on the test set.
      values: the number of values in the variables.
      seconds: for each size of a batch, those of every round.
    """

    difference: float
    largest: float
    accuracy: tuple[float, float]
    values: tuple[int, int]
    seconds: dict[int, tuple[list[float], list[float]]]


def run(config: Config) -> Comparison:
    """Trains a network as `config` says, or loads it, and compares it with the folded one."""
    with jax.enable_x64(config.dtype == "float64"):
        state = train(config).state
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return compare(network(config), variables, data.load(config.dataset, config.data_dir))


def compare(
    model: ConvNet,
    variables: Tree,
    dataset: data.Dataset,
    epsilon: float = 1e-5,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Comparison:
    """Compares a trained network with the folded one, on test images."""
    images, labels = dataset.test_images, dataset.test_labels
    networks = ((model, variables), folded(model, variables, epsilon))
    calls = [
        partial(jax.jit(partial(model.apply, train=False)), variables)
        for model, variables in networks
    ]
    logits, folded_logits = (np.asarray(call(images)) for call in calls)
    return Comparison(
        difference=float(np.abs(folded_logits - logits).max()),
        largest=float(np.abs(logits).max()),
        accuracy=(_accuracy(logits, labels), _accuracy(folded_logits, labels)),
        values=(_size(networks[0][1]), _size(networks[1][1])),
        seconds={n: _seconds(calls, images[:n]) for n in batch_sizes if n <= len(images)},
    )


def folded(model: ConvNet, variables: Tree, epsilon: float = 1e-5) -> tuple[ConvNet, Tree]:
    """The network without batch norms, and the variables with which it does the same."""
    pairs = {name.replace("BatchNorm", "Conv"): name for name in variables["batch_stats"]}
    variables = fold_linen(variables, pairs, epsilon=epsilon)
    return model.clone(norm=no_norm, use_bias=True), variables


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, -1) == labels))


def _size(variables: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def _seconds(
    calls: list[Callable[..., Any]], images: np.ndarray
) -> tuple[list[float], list[float]]:
    batch = jnp.asarray(images)
    trained, folded = (partial(call, batch) for call in calls)
    times = turn_by_turn({"trained": trained, "folded": folded}, at_most=1001)
    return times["trained"], times["folded"]
