"""The measurements of a run: kept in its checkpoints, drawn at its end."""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import traverse_util

# Of each layer; more lines than this cannot be told apart.
CHANNELS = 4
# A picture cannot show more points than this.
MOVING_POINTS = 500


@dataclass
class History:
    """The measurements of a run so far, as JSON can hold them.

    Attributes:
      loss: of every step.
      train_accuracy: of every step.
      test_accuracy: after every epoch.
      moving_steps: the steps at which moving averages were recorded.
      moving: those of each layer's first channels at each such step, by "layer/mean" and
        "layer/var".
    """

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    moving_steps: list[int] = field(default_factory=list)
    moving: dict[str, list[list[float]]] = field(default_factory=dict)

    def record_moving(self, step: int, total_steps: int, batch_stats: Any) -> None:
        """Append the moving averages if `step` is one of about `MOVING_POINTS` steps to record."""
        if step % max(1, total_steps // MOVING_POINTS) == 0:
            self.moving_steps.append(step)
            for name, values in first_channels(batch_stats).items():
                self.moving.setdefault(name, []).append(values)


def first_channels(batch_stats: Any) -> dict[str, list[float]]:
    """Return each layer's statistics of its first channels, by "layer/mean" and "layer/var"."""
    leaves = traverse_util.flatten_dict(jax.device_get(batch_stats), sep="/")
    return {name: np.asarray(leaf).ravel()[:CHANNELS].tolist() for name, leaf in leaves.items()}
