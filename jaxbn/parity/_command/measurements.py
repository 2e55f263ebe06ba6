"""Measure each framework's convention, and its errors on hard inputs."""

import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.parity import _oracle
from jaxbn.parity._command.frameworks import Parameters, available
from jaxbn.parity._hard_inputs import C, N, representative
from jaxbn.parity._identify import ConventionError, identify
from jaxbn.parity._layer import DifferentiableLayer

KEYWORDS = ("momentum", "epsilon", "batch_variance", "running_variance")
# The names of the hard inputs, in the order of the tables.
INPUTS = tuple(representative())
# The results whose errors are shown, and their keys among what a layer returns.
RESULTS = {"y": "y", "dx": "x", "dscale": "scale"}
_PACKAGES = ("jaxbn", "jax", "torch", "flax", "dm-haiku", "equinox", "keras")


def measure_frameworks(names: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """Return everything that the command shows, as values that JSON can hold.

    Args:
      names: which of `FRAMEWORKS` to measure.
      dtype: the dtype of the hard inputs. Conventions are always identified in float32.
      device: JAX's name of the platform to run on.
    """
    rng = np.random.default_rng(1)
    dy = rng.normal(size=(N, C)).astype(jnp.dtype(dtype))
    parameters = _parameters(rng, dtype)
    jax_device = jax.devices(device)[0]
    with jax.enable_x64(dtype == "float64"), jax.default_device(jax_device):
        makers, missing = available(names, parameters)
        conventions, errors = {}, {}
        for title, make in makers.items():
            print(f"probing {title}", file=sys.stderr)
            conventions[title] = _convention(make(parameters))
            errors[title] = None
            if {"epsilon", "batch_variance"} <= conventions[title].keys():
                errors[title] = _errors(make(parameters), conventions[title], parameters, dy)
    return {
        "device": jax_device.device_kind,
        "dtype": dtype,
        "shape": [N, C],
        "versions": _versions(),
        "conventions": conventions,
        "errors": errors,
        "missing": missing,
    }


def missing_frameworks(names: Sequence[str], dtype: str, device: str) -> dict[str, str]:
    """Return why frameworks cannot be measured, by title, for those that cannot."""
    with jax.enable_x64(dtype == "float64"), jax.default_device(jax.devices(device)[0]):
        return available(names, _parameters(np.random.default_rng(1), dtype))[1]


def _parameters(rng: np.random.Generator, dtype: str) -> Parameters:
    param_dtype = np.float64 if dtype == "float64" else np.float32
    return Parameters(*rng.uniform(0.5, 2, (2, C)).astype(param_dtype))


def _convention(layer: DifferentiableLayer) -> dict[str, Any]:
    """Return the keywords that were found, and a note if they do not describe the layer fully."""
    try:
        return {**identify(layer, C), "note": None}
    except ConventionError as error:
        found = {name: error.found[name] for name in KEYWORDS if name in error.found}
        # A property that is recognized but has no keyword; otherwise the reason for the error.
        notes = [f"averages {error.found[name]}" for name in ["averages"] if name in error.found]
        if "epsilon_added_to" in error.found:
            notes.append(f"epsilon added to {error.found['epsilon_added_to']}")
        if len(found) < len(KEYWORDS) or not notes:
            notes = [f"{error.probe}: {error.reason}"]
        return {**found, "note": "; ".join(notes)}


def _errors(
    layer: DifferentiableLayer,
    convention: Mapping[str, Any],
    parameters: Parameters,
    dy: np.ndarray,
) -> dict[str, dict[str, float | None]]:
    """Return the errors on each hard input, measured against the layer's own convention."""
    ddof = int(convention["batch_variance"] == "unbiased")
    errors = {}
    for name, x in representative().items():
        x = x.astype(dy.dtype)
        truth = _oracle.batch_norm(x, dy, *parameters, epsilon=convention["epsilon"], ddof=ddof)
        y, gradients = layer.step(x, dy)
        values = {"y": y, **gradients}
        found = {
            result: _oracle.error(values[key], getattr(truth, result))
            for result, key in RESULTS.items()
        }
        # JSON has no NaN.
        errors[name] = {name: e if math.isfinite(e) else None for name, e in found.items()}
    return errors


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
