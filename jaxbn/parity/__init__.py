"""Find out which convention a batch norm follows, and where two layers or two networks differ.

`python -m jaxbn.parity` probes the layers of all installed frameworks.
"""

# `_layer` defines what these tools call on a layer. These private packages implement them:
# `_adapters` wraps the frameworks' layers, so that they have these methods. `_identify` finds a
# layer's convention by probing it. `_networks` runs the frameworks' networks, and `_match` finds
# which layers correspond. `_compare` trains two layers, or runs two networks, side by side; its
# `diagnosis` finds the reasons for their differences. `_command` is behind the command, and only it
# imports the others.

from jaxbn.parity._adapters import batch_norm_layer as batch_norm_layer
from jaxbn.parity._adapters import equinox_layer as equinox_layer
from jaxbn.parity._adapters import haiku_layer as haiku_layer
from jaxbn.parity._adapters import keras_layer as keras_layer
from jaxbn.parity._adapters import linen_layer as linen_layer
from jaxbn.parity._adapters import nnx_layer as nnx_layer
from jaxbn.parity._adapters import torch_layer as torch_layer
from jaxbn.parity._compare import AccuracyReport as AccuracyReport
from jaxbn.parity._compare import AccuracyRow as AccuracyRow
from jaxbn.parity._compare import Report as Report
from jaxbn.parity._compare import Row as Row
from jaxbn.parity._compare import assert_parity as assert_parity
from jaxbn.parity._compare import compare as compare
from jaxbn.parity._compare import compare_accuracy as compare_accuracy
from jaxbn.parity._compare import compare_models as compare_models
from jaxbn.parity._identify import ConventionError as ConventionError
from jaxbn.parity._identify import identify as identify
from jaxbn.parity._layer import DifferentiableLayer as DifferentiableLayer
from jaxbn.parity._layer import Layer as Layer
from jaxbn.parity._match import match_names as match_names

__all__ = [
    "AccuracyReport",
    "AccuracyRow",
    "ConventionError",
    "DifferentiableLayer",
    "Layer",
    "Report",
    "Row",
    "assert_parity",
    "batch_norm_layer",
    "compare",
    "compare_accuracy",
    "compare_models",
    "equinox_layer",
    "haiku_layer",
    "identify",
    "keras_layer",
    "linen_layer",
    "match_names",
    "nnx_layer",
    "torch_layer",
]
