"""Fold batch norms into the layers before them, for inference."""

from jaxbn.inference._fold import fold as fold
from jaxbn.inference._fold_linen import fold_linen as fold_linen

__all__ = ["fold", "fold_linen"]
