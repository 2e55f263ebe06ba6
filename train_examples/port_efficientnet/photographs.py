"""Photographs that scikit-image brings with it, as the network takes them."""

from collections.abc import Callable

import numpy as np
from skimage import color, data, transform

# Files inside scikit-image's package: nothing is downloaded.
SOURCES: dict[str, Callable[[], np.ndarray]] = {
    "cat": data.chelsea,
    "cup of coffee": data.coffee,
    "rocket": data.rocket,
    "camera on a tripod": data.camera,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
    "astronaut": data.astronaut,
    "brick wall": data.brick,
    "page of a book": data.page,
    "coins": data.coins,
    "grass": data.grass,
    "gravel": data.gravel,
    "clock, blurred": data.clock,
    "moon": data.moon,
    "galaxies": data.hubble_deep_field,
    "retina": data.retina,
    "cells": data.immunohistochemistry,
}
# The first five show something that ImageNet has a class for.
OF_IMAGENET = 5
# The names of those ImageNet classes that the command finds in them.
CLASSES = {
    109: "brain coral",
    111: "nematode",
    285: "Egyptian cat",
    429: "baseball",
    450: "bobsled",
    539: "doormat",
    619: "lampshade",
    646: "maze",
    657: "missile",
    665: "moped",
    712: "Petri dish",
    872: "tripod",
    911: "wool",
    918: "crossword puzzle",
    922: "menu",
    967: "espresso",
    971: "bubble",
}


def load(number: int, size: int) -> dict[str, np.ndarray]:
    """Return the first photographs by their names, each (size, size, 3), with values in [0, 1]."""
    return {name: _square(SOURCES[name](), size) for name in list(SOURCES)[:number]}


def normalized(pixels: np.ndarray) -> np.ndarray:
    """Return what the network was trained on: values in about [-1, 1], in float32."""
    return ((255 * pixels - 127) / 128).astype(np.float32)


def darkened(pixels: np.ndarray) -> np.ndarray:
    """Return photographs that were exposed too briefly: a sixteenth of the light."""
    return pixels / 16


def _square(photograph: np.ndarray, size: int) -> np.ndarray:
    """Return the middle of a photograph, in RGB."""
    if photograph.ndim == 2:
        photograph = color.gray2rgb(photograph)
    height, width, _ = photograph.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = photograph[top : top + side, left : left + side]
    resized = transform.resize(middle, (size, size), order=3, anti_aliasing=True)
    return np.clip(np.asarray(resized), 0, 1)
