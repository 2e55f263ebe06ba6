"""Darkened photographs, before and after running statistics are recalibrated on them."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn.calibrate import recalibrate
from jaxbn.linen import override
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.photographs import OF_IMAGENET, darkened, normalized

# All batch norms but the one behind the first convolution.
FROZEN = {"block_*/**": {"frozen": True}, "head/**": {"frozen": True}}


class Agreement(NamedTuple):
    """How many darkened photographs get the class that they have in full light.

    Attributes:
      all: of all photographs.
      of_imagenet: of those that show a class of ImageNet.
    """

    all: int
    of_imagenet: int


def agreements(
    model: EfficientNetLite0, variables: Mapping[str, Any], pixels: np.ndarray
) -> dict[str, Agreement]:
    """Classify darkened photographs with the statistics that were loaded, and with new ones."""
    evaluate = jax.jit(partial(model.apply, train=False))
    wanted = top_1(evaluate(variables, normalized(pixels)))
    dark = normalized(darkened(pixels))
    # One pass over a single batch is exact.
    options = {"passes": 1, "train": False}
    statistics = {
        "as loaded": variables,
        "all recalibrated": recalibrate(model, variables, [dark], **options),
        "the first recalibrated": override(recalibrate, FROZEN)(
            model, variables, [dark], **options
        ),
    }

    def agreement(variables: Mapping[str, Any]) -> Agreement:
        same = top_1(evaluate(variables, dark)) == wanted
        return Agreement(int(same.sum()), int(same[:OF_IMAGENET].sum()))

    return {name: agreement(of) for name, of in statistics.items()}


def top_1(logits: Any) -> np.ndarray:
    """Return the class with the largest logit, of each image."""
    return np.argmax(np.asarray(logits), -1)
