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
from jaxbn.parity._identify import ConventionError, identify
from jaxbn.parity._layer import DifferentiableLayer

N, C = 4096, 16
KEYWORDS = ("momentum", "epsilon", "batch_variance", "running_variance")
INPUTS = (
    *("N(0, 1)", "N(1e3, 1)", "N(1e4, 1)", "N(1e6, 1)"),
    *("constant 3.3", "a spike of 1e6", "two far clusters", "ramp"),
)
# The results whose errors are shown, and their keys among what a layer returns.
RESULTS = {"y": "y", "dx": "x", "dscale": "scale"}
_PACKAGES = ("jaxbn", "jax", "torch", "flax", "dm-haiku", "equinox", "keras")


def hard_inputs(dtype: Any) -> dict[str, np.ndarray]:
    """Return batches of shape (N, C) on which rounding can cause large errors."""
    normal = np.random.default_rng(0).normal(size=(N, C))
    row = np.arange(N)[:, None] + np.zeros(C)
    values = (
        *(normal, normal + 1e3, normal + 1e4, normal + 1e6),
        *(np.full((N, C), 3.3), np.where(row == 7, 1e6, normal)),
        *(np.sign(normal) * 1e3 + normal + 1e6, row),
    )
    return {name: value.astype(dtype) for name, value in zip(INPUTS, values, strict=True)}


def measure_frameworks(names: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """Return everything that the command shows, as values that JSON can hold.

    Args:
      names: which of `FRAMEWORKS` to measure.
      dtype: the dtype of the hard inputs. Conventions are always identified in float32.
      device: JAX's name of the platform to run on.
    """
    rng = np.random.default_rng(1)
    dy = rng.normal(size=(N, C)).astype(jnp.dtype(dtype))
    param_dtype = np.float64 if dtype == "float64" else np.float32
    parameters = Parameters(*rng.uniform(0.5, 2, (2, C)).astype(param_dtype))
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


def _convention(layer: DifferentiableLayer) -> dict[str, Any]:
    """Return the keywords that were found, and a note if they do not describe the layer fully."""
    try:
        return {**identify(layer, C), "note": None}
    except ConventionError as error:
        found = {name: error.found[name] for name in KEYWORDS if name in error.found}
        # A property that is recognized but has no keyword; otherwise the reason of the error.
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
    keywords = {name: convention[name] for name in ("epsilon", "batch_variance")}
    errors = {}
    for name, x in hard_inputs(dy.dtype).items():
        truth = _oracle.batch_norm(x, dy, *parameters, **keywords)
        y, gradients = layer.step(x, dy)
        values = {"y": y, **gradients}
        found = {name: _oracle.error(values[key], truth[key]) for name, key in RESULTS.items()}
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
