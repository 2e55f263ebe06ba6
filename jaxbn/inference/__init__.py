"""Fold batch norms into the layers before them, for inference."""

from jaxbn.inference._find_pairs import find_pairs as find_pairs
from jaxbn.inference._fold import fold as fold
from jaxbn.inference._fold_linen import fold_linen as fold_linen
from jaxbn.inference._fold_nnx import fold_nnx as fold_nnx

__all__ = ["find_pairs", "fold", "fold_linen", "fold_nnx"]
