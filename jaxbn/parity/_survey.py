"""What the command finds: each framework's convention, and its errors on hard inputs."""

import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.parity import _oracle
from jaxbn.parity._frameworks import Parameters, available
from jaxbn.parity._hard_inputs import C, N, representative
from jaxbn.parity._identify import ConventionError, identify
from jaxbn.parity._layer import DifferentiableLayer

KEYWORDS = ("momentum", "epsilon", "batch_variance", "running_variance")
INPUTS = (
    *("N(0, 1)", "N(1e3, 1)", "N(1e4, 1)", "N(1e6, 1)"),
    *("constant 3.3", "a spike of 1e6", "two far clusters", "ramp"),
)
# What is compared, and its name among the layer's results.
RESULTS = {"y": "y", "dx": "x", "dscale": "scale"}
_PACKAGES = ("jaxbn", "jax", "torch", "flax", "dm-haiku", "equinox", "keras")


def survey(names: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """All that the command shows, in a form that JSON has.

    Args:
      names: which of `FRAMEWORKS`.
      dtype: of the hard inputs; the conventions are looked for in float32.
      device: JAX's name of the platform to run on.
    """
    rng = np.random.default_rng(1)
    dy = rng.normal(size=(N, C)).astype(jnp.dtype(dtype))
    kept = np.float64 if dtype == "float64" else np.float32
    parameters = Parameters(*rng.uniform(0.5, 2, (2, C)).astype(kept))
    where = jax.devices(device)[0]
    with jax.enable_x64(dtype == "float64"), jax.default_device(where):
        makers, missing = available(names, parameters)
        conventions, errors = {}, {}
        for title, make in makers.items():
            print(f"probing {title}", file=sys.stderr)
            conventions[title] = _convention(make(parameters))
            errors[title] = None
            if {"epsilon", "batch_variance"} <= conventions[title].keys():
                errors[title] = _errors(make(parameters), conventions[title], parameters, dy)
    return {
        "device": where.device_kind,
        "dtype": dtype,
        "shape": [N, C],
        "versions": _versions(),
        "conventions": conventions,
        "errors": errors,
        "missing": missing,
    }


def _convention(layer: DifferentiableLayer) -> dict[str, Any]:
    """The keywords that were found, all or some, and a note where they are not the whole."""
    try:
        return {**identify(layer, C), "note": None}
    except ConventionError as error:
        found = {name: error.found[name] for name in KEYWORDS if name in error.found}
        # Recognized, though no keyword says it; or not understood, and then this is the report.
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
    """On each hard input, against what the layer's own convention asks for."""
    ddof = int(convention["batch_variance"] == "unbiased")
    errors = {}
    for name, x in zip(INPUTS, representative().values(), strict=True):
        x = x[:N, :C].astype(dy.dtype)
        truth = _oracle.batch_norm(x, dy, *parameters, epsilon=convention["epsilon"], ddof=ddof)
        y, gradients = layer.step(x, dy)
        values = {"y": y, **gradients}
        found = {
            result: _oracle.error(values[key], getattr(truth, result))
            for result, key in RESULTS.items()
        }
        # JSON has no word for what is not a number.
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
