"""Darkened photographs, before and after the running statistics are recalibrated on them."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn.calibrate import recalibrate
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.photographs import darkened, normalized


class Agreement(NamedTuple):
    """How many darkened photographs get the class that they have in full light."""

    before: int
    after: int


def agreement(
    model: EfficientNetLite0, variables: Mapping[str, Any], pixels: np.ndarray
) -> Agreement:
    """Classify photographs in full light and darkened, then darkened with new statistics."""
    evaluate = jax.jit(partial(model.apply, train=False))
    dark = normalized(darkened(pixels))
    # One pass is exact for one batch.
    recalibrated = recalibrate(model, variables, [dark], passes=1, train=False)
    wanted = top_1(evaluate(variables, normalized(pixels)))
    classes = (top_1(evaluate(of, dark)) for of in (variables, recalibrated))
    return Agreement(*(int(np.sum(found == wanted)) for found in classes))


def top_1(logits: Any) -> np.ndarray:
    """Return the class with the largest logit, of each image."""
    return np.argmax(np.asarray(logits), -1)
