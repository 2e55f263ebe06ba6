"""Batch normalization for JAX and Flax, with an explicit convention."""

import importlib
import typing

from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._batch_renorm import batch_renorm as batch_renorm
from jaxbn._conventions import EXERCISE as EXERCISE
from jaxbn._conventions import FLAX as FLAX
from jaxbn._conventions import KERAS as KERAS
from jaxbn._conventions import PYTORCH as PYTORCH
from jaxbn._decay_mask import decay_mask as decay_mask
from jaxbn._init import init as init
from jaxbn._keep_finite import keep_finite as keep_finite

__all__ = [
    "EXERCISE",
    "FLAX",
    "KERAS",
    "PYTORCH",
    "batch_norm",
    "batch_renorm",
    "decay_mask",
    "init",
    "keep_finite",
]
__version__ = "0.1.0"

# Some of these need Flax, so each is imported when it is first used.
_SUBMODULES = ("calibrate", "convert", "health", "inference", "linen", "nnx", "parity")

if typing.TYPE_CHECKING:
    from jaxbn import calibrate as calibrate
    from jaxbn import convert as convert
    from jaxbn import health as health
    from jaxbn import inference as inference
    from jaxbn import linen as linen
    from jaxbn import nnx as nnx
    from jaxbn import parity as parity
else:

    def __getattr__(name):
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
