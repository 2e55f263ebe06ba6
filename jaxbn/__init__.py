"""Batch normalization for JAX and Flax that says which convention it follows."""

from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._batch_norm import init as init
from jaxbn._conventions import EXERCISE as EXERCISE
from jaxbn._conventions import FLAX as FLAX
from jaxbn._conventions import KERAS as KERAS
from jaxbn._conventions import PYTORCH as PYTORCH

__all__ = ["EXERCISE", "FLAX", "KERAS", "PYTORCH", "batch_norm", "init"]
__version__ = "0.1.0"
