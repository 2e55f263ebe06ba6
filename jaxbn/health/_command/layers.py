"""Find the batch norms among the arrays of a checkpoint."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.health._command.names import layer_and_leaf, printable


class Names(NamedTuple):
    """A framework's names of the statistics, and how to make its layers update them."""

    mean: str
    var: str
    batches: str | None
    how_to_update: str


FRAMEWORKS = (
    Names(
        *("mean", "var", "count"),
        'in Linen, apply with mutable=["batch_stats"] and use_running_average=False, and keep the '
        "batch_stats that it returns; in NNX, call model.train()",
    ),
    Names(*("running_mean", "running_var", "num_batches_tracked"), "call model.train()"),
    Names("moving_mean", "moving_variance", None, "call the model with training=True"),
)


class Layer(NamedTuple):
    """The running statistics of a batch norm.

    Attributes:
      path: the name of the layer in the checkpoint.
      mean, var: the statistics, in float64 and of the same shape: (C,), or with further axes in
        front, such as that of replicas.
      batches: the number of batches that the layer counted, or the largest if there are several;
        None if it is not stored.
      names: the names of the statistics.
    """

    path: str
    mean: np.ndarray
    var: np.ndarray
    batches: int | None
    names: Names


def is_statistic(name: str) -> bool:
    """Return whether an array of this name can be a statistic of a batch norm."""
    # The moments in an optimizer's state have the names of what it optimizes.
    if "opt_state" in re.split("[./]", name):
        return False
    leaf = layer_and_leaf(name)[1]
    return any(leaf in (names.mean, names.var, names.batches) for names in FRAMEWORKS)


def names_looked_for() -> str:
    """Return the names of the statistics in all frameworks, in words."""
    return ", or ".join(f"{names.mean} and {names.var}" for names in FRAMEWORKS)


def find_layers(arrays: Mapping[str, np.ndarray]) -> tuple[list[Layer], list[str]]:
    """Return the batch norms in order, and the names of skipped candidates with the reason.

    Scalars, such as logged metrics, are ignored: a batch norm has a value for each feature.
    """
    by_layer: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        layer, leaf = layer_and_leaf(name)
        by_layer.setdefault(layer, {})[leaf] = array
    layers, skipped = [], []
    for path, leaves in by_layer.items():
        for names in FRAMEWORKS:
            if not {names.mean, names.var} <= leaves.keys():
                continue
            mean, var = leaves[names.mean], leaves[names.var]
            if not mean.ndim and not var.ndim:
                continue
            if problem := _problem(names, mean, var):
                skipped.append(f"{printable(path)}: {problem}")
                continue
            batches = _number(leaves.get(names.batches or ""))
            values = (np.asarray(mean, np.float64), np.asarray(var, np.float64))
            layers.append(Layer(printable(path), *values, batches, names))
    return layers, skipped


def _problem(names: Names, mean: np.ndarray, var: np.ndarray) -> str | None:
    """Return why the arrays are not the statistics of a batch norm."""
    if mean.shape != var.shape:
        return f"{names.mean} has shape {mean.shape}, but {names.var} has {var.shape}"
    for name, value in ((names.mean, mean), (names.var, var)):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return f"{name} has dtype {value.dtype}, which is not floating"
    return None


def _number(value: np.ndarray | None) -> int | None:
    if value is None or not value.size or not jnp.issubdtype(value.dtype, jnp.integer):
        return None
    return int(value.max())
