"""What a batch norm's convention is, and where two layers or two models part."""

from jaxbn.parity._adapters import from_batch_norm as from_batch_norm
from jaxbn.parity._adapters import from_equinox as from_equinox
from jaxbn.parity._adapters import from_haiku as from_haiku
from jaxbn.parity._adapters import from_keras as from_keras
from jaxbn.parity._adapters import from_linen as from_linen
from jaxbn.parity._adapters import from_nnx as from_nnx
from jaxbn.parity._adapters import from_torch as from_torch
from jaxbn.parity._compare import assert_parity as assert_parity
from jaxbn.parity._compare import compare as compare
from jaxbn.parity._identify import ConventionError as ConventionError
from jaxbn.parity._identify import identify as identify
from jaxbn.parity._layer import DifferentiableLayer as DifferentiableLayer
from jaxbn.parity._layer import Layer as Layer
from jaxbn.parity._models import compare_models as compare_models
from jaxbn.parity._report import Report as Report

__all__ = [
    "ConventionError",
    "DifferentiableLayer",
    "Layer",
    "Report",
    "assert_parity",
    "compare",
    "compare_models",
    "from_batch_norm",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_torch",
    "identify",
]
