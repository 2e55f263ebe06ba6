"""Batch normalization for JAX and Flax that says which convention it follows."""

from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._batch_norm import init as init
from jaxbn._conventions import EXERCISE as EXERCISE
from jaxbn._conventions import FLAX as FLAX
from jaxbn._conventions import KERAS as KERAS
from jaxbn._conventions import PYTORCH as PYTORCH
from jaxbn._decay_mask import decay_mask as decay_mask
from jaxbn._keep_finite import keep_finite as keep_finite

__all__ = [
    "EXERCISE",
    "FLAX",
    "KERAS",
    "PYTORCH",
    "batch_norm",
    "decay_mask",
    "init",
    "keep_finite",
]
__version__ = "0.1.0"
