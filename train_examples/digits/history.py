"""What a run has measured so far: kept in its checkpoints, drawn at its end."""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import traverse_util

# Of each layer; more lines than this cannot be told apart.
CHANNELS = 4
# More points than this a picture does not show.
MOVING_POINTS = 500


@dataclass
class History:
    """Loss and accuracy of every step, accuracy on the test set after every epoch, and the moving
    averages of the first channels of every layer, by "layer/mean" and "layer/var", at some steps.

    Numbers, lists and dicts alone, so that JSON holds it.
    """

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    moving_steps: list[int] = field(default_factory=list)
    moving: dict[str, list[list[float]]] = field(default_factory=dict)

    def record_moving(self, step: int, total_steps: int, batch_stats: Any) -> None:
        if step % max(1, total_steps // MOVING_POINTS) == 0:
            self.moving_steps.append(step)
            for name, values in first_channels(batch_stats).items():
                self.moving.setdefault(name, []).append(values)


def first_channels(batch_stats: Any) -> dict[str, list[float]]:
    """The statistics of the first channels of each layer, by "layer/mean" and "layer/var"."""
    leaves = traverse_util.flatten_dict(jax.device_get(batch_stats), sep="/")
    return {name: np.asarray(leaf).ravel()[:CHANNELS].tolist() for name, leaf in leaves.items()}
