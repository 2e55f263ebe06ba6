"""The two networks compared, and each one's float32 with its own float64."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from jaxbn.parity import compare_models
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.names import names

# PyTorch's dtype for each of NumPy's.
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Errors(NamedTuple):
    """The errors of an intermediate in float32, relative to its largest value in float64."""

    torch: float
    jaxbn: float


def differences(
    variables: Mapping[str, Any], torch_model: torch.nn.Module, images: np.ndarray, dtype: str
) -> dict[str, float]:
    """Return the largest relative difference in each stage, with both networks in a dtype."""
    with jax.enable_x64(True):
        ours, theirs, images = in_dtype(variables, torch_model, images, dtype)
        report = compare_models((EfficientNetLite0(), ours), theirs, names(), images)
    stages: dict[str, float] = {}
    for row in report.rows:
        # NumPy's maximum, because Python's can ignore NaN.
        stages[row.stage] = float(np.maximum(stages.get(row.stage, 0.0), row.relative))
    return stages


def float32_errors(
    variables: Mapping[str, Any], torch_model: torch.nn.Module, images: np.ndarray
) -> dict[str, Errors]:
    """Return the errors of each intermediate of a training forward pass in float32."""
    runs = {}
    with jax.enable_x64(True):
        for dtype in DTYPES:
            of_dtype = in_dtype(variables, torch_model, images, dtype)
            runs[dtype] = _torch_values(*of_dtype[1:]), _flax_values(of_dtype[0], of_dtype[2])
    (theirs32, ours32), (theirs64, ours64) = runs["float32"], runs["float64"]
    return {
        name: Errors(distance(theirs32[name], theirs64[name]), distance(ours32[name], ours64[name]))
        for name in ours64
    }


def in_dtype(
    variables: Mapping[str, Any], torch_model: torch.nn.Module, images: np.ndarray, dtype: str
) -> tuple[Any, torch.nn.Module, np.ndarray]:
    """Return the variables, a copy of the network and the images in a dtype."""
    ours = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
    return ours, copy.deepcopy(torch_model).to(DTYPES[dtype]), images.astype(dtype)


def distance(values: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value."""
    # Subtract in float64: in float32 the subtraction would round as well.
    return float(np.max(np.abs(values.astype(np.float64) - truth)) / np.max(np.abs(truth)))


def _torch_values(model: torch.nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    values = {}

    def keep(path: str):
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            value = output.detach().numpy()
            values[path] = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

        return hook

    modules = dict(model.train().named_modules())
    for path, name in names().items():
        modules[name].register_forward_hook(keep(path))
    with torch.no_grad():
        model(torch.tensor(images.transpose(0, 3, 1, 2)))
    return values


def _flax_values(variables: Mapping[str, Any], images: np.ndarray) -> dict[str, np.ndarray]:
    @jax.jit
    def run(variables: Any, images: Any) -> Any:
        kept = ["batch_stats", "intermediates"]
        model = EfficientNetLite0()
        return model.apply(variables, images, True, mutable=kept, capture_intermediates=True)[1]

    kept: dict[Any, Any] = flatten_dict(run(variables, images)["intermediates"])
    outputs = {"/".join(path[:-1]): value for path, (value,) in kept.items()}
    return {path: np.asarray(outputs[path]) for path in names()}
