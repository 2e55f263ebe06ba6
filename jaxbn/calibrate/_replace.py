"""Replace the running statistics of layers by those of their calls."""

from functools import reduce
from typing import TypeVar

import jax
import numpy as np

from jaxbn._running import Estimator
from jaxbn.calibrate._observe import PerCall
from jaxbn.calibrate._statistics import (
    Statistics,
    in_layer,
    leaf_indices,
    merge_statistics,
    to_state,
)

Tree = TypeVar("Tree")


def replaced(
    statistics: Tree, calls: PerCall[Statistics], running_variance: Estimator | None = None
) -> Tree:
    """Return the tree of running statistics with those of the calls, merged for each layer.

    Args:
      statistics: the old running statistics.
      calls: the statistics of each call.
      running_variance: the estimator of all variances, or None for that of each layer.
    """
    if running_variance is not None:
        ddof = int(running_variance == "unbiased")
        calls = {
            layer: tuple(call._replace(ddof=np.full_like(call.ddof, ddof)) for call in of_layer)
            for layer, of_layer in calls.items()
        }
    leaves, structure = jax.tree.flatten(statistics)
    indices = leaf_indices(statistics)
    merged = {layer: reduce(merge_statistics, of_layer) for layer, of_layer in calls.items()}
    if not any(np.any(new.n > 0) for new in merged.values()):
        raise ValueError("batches hold no values: they are empty, or entirely masked out.")
    for layer, new in merged.items():
        by_name = indices.get(layer, {})
        if not {"mean", "var"} <= by_name.keys():
            raise ValueError(
                f"variables have no 'mean' and 'var'{in_layer(layer)}. The running statistics are "
                f"variables, too: in Linen, model.init makes 'batch_stats', which must be kept and "
                f"saved with 'params'."
            )
        if np.max(new.n, initial=0) == 1 and new.ddof.flat[0] == 1:
            raise ValueError(
                f"batches hold one value per feature{in_layer(layer)}, which has no unbiased "
                f"variance; give more values, or set running_variance='biased' in the layer or in "
                "recalibrate."
            )
        mean, var = by_name["mean"], by_name["var"]
        leaves[mean], leaves[var] = state = to_state(new, leaves[mean], leaves[var])
        is_kept = (new.n <= new.ddof.flat[0]).reshape(np.shape(state[0]))
        if not all(np.all(np.isfinite(leaf) | is_kept) for leaf in state):
            raise ValueError(
                f"batches give statistics that are not finite{in_layer(layer)}: look for NaN, "
                f"infinity or values that overflow in them and in the weights."
            )
    return jax.tree.unflatten(structure, leaves)
