"""Darkened photographs, before and after the running statistics are recalibrated on them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn.calibrate import recalibrate
from train_examples.port_efficientnet import deploy
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.photographs import darkened, normalized


class Agreement(NamedTuple):
    """How many darkened photographs get the class that they have in full light."""

    before: int
    after: int


def agreement(variables: Mapping[str, Any], pixels: np.ndarray) -> Agreement:
    """Classify photographs in full light and darkened, then darkened with new statistics."""
    dark = normalized(darkened(pixels))
    wanted = top_1(deploy.whole(variables)(normalized(pixels)))
    before = top_1(deploy.whole(variables)(dark))
    recalibrated = recalibrate(EfficientNetLite0(), variables, [dark], train=False)
    after = top_1(deploy.whole(recalibrated)(dark))
    return Agreement(int(np.sum(before == wanted)), int(np.sum(after == wanted)))


def top_1(logits: Any) -> np.ndarray:
    """Return the class with the largest logit, of each image."""
    return np.argmax(np.asarray(logits), -1)
