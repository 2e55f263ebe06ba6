"""The weights of the network: random ones, or those of a file."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from safetensors.torch import load_file

from train_examples.port_resnet.config import WeightsError
from train_examples.port_resnet.torch_model import entries

# A state dict. Floating-point values are read as float64, which is exact for narrower types.
StateDict = Mapping[str, np.ndarray]


def lively(width: int, classes: int, seed: int) -> StateDict:
    """Return random weights and statistics, none of which is 0 or 1 as in a new network."""
    rng = np.random.default_rng(seed)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("num_batches_tracked"):
            return rng.integers(1, 1000, shape)
        if name.endswith("running_var"):
            return rng.uniform(0.5, 2, shape)
        if name.endswith(("running_mean", "bias")):
            return 0.5 * rng.normal(size=shape)
        if len(shape) == 1:
            # One scale in five is negative.
            return rng.uniform(0.5, 1.5, shape) * rng.choice([1, 1, 1, 1, -1], shape)
        return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))

    shapes = entries(width, classes)
    values = {name: np.asarray(value(name, shape)) for name, shape in shapes.items()}
    # Round to float32, so that both precisions compute with the same values.
    return as_dtype(as_dtype(values, np.float32), np.float64)


def read(path: Path) -> StateDict:
    """Return the weights in a file. No code in the file is run.

    Raises a `WeightsError` if the file does not hold a dict of dense tensors by their names.
    """
    readers = {".safetensors": load_file, ".pt": _load_pickle, ".pth": _load_pickle}
    if path.suffix not in readers:
        endings = ", ".join(readers)
        raise WeightsError(
            f"--state-dict {path} must end in one of {endings}, got {path.suffix!r}."
        )
    if not path.is_file():
        raise WeightsError(f"--state-dict {path} is not a file.")
    try:
        tensors = readers[path.suffix](path)
    # A damaged file can raise nearly anything.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        text = f"--state-dict {path} is damaged, or is not a state dict: {reason}"
        raise WeightsError(text) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(v, torch.Tensor) for v in tensors.values()
    ):
        raise WeightsError(f"--state-dict {path} must hold only a dict of tensors by their names.")
    for name, tensor in tensors.items():
        _check_tensor(f"--state-dict {path}", name, tensor)
    # PyTorch before 0.4.1 saved no counts of batches.
    norms = [name.removesuffix("running_var") for name in tensors if name.endswith("running_var")]
    counts = {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    return {name: _values(v) for name, v in {**counts, **tensors}.items()}


def as_dtype(state_dict: StateDict, dtype: DTypeLike) -> StateDict:
    """Return the state dict with its values, but not its counts, converted to a dtype."""
    return {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in state_dict.items()}


def _check_tensor(file: str, name: object, tensor: torch.Tensor) -> None:
    """Raise a `WeightsError` for a tensor without a name, or that NumPy cannot hold."""
    if not isinstance(name, str):
        raise WeightsError(f"{file} must hold tensors by their names, got the key {name!r}.")
    kinds = {
        "nested": (tensor.is_nested, "save its parts"),
        "meta": (tensor.is_meta, "it has no values, so load the weights before saving"),
        "quantized": (tensor.is_quantized, "save what its dequantize() returns"),
        "sparse": (tensor.layout != torch.strided, "save what its to_dense() returns"),
    }
    for kind, (is_kind, remedy) in kinds.items():
        if is_kind:
            raise WeightsError(f"{file} must hold dense tensors, got a {kind} {name}: {remedy}.")
    try:
        _values(tensor)
    except Exception:
        raise WeightsError(
            f"{file} must hold tensors of a dtype that NumPy can hold, got {tensor.dtype} for "
            f"{name}."
        ) from None


def _values(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy(force=True)


def _load_pickle(path: Path) -> object:
    with warnings.catch_warnings():
        # PyTorch warns about kinds of tensors that it is going to remove.
        warnings.simplefilter("ignore")
        # `weights_only` refuses every call in a pickle except those that build tensors.
        return torch.load(path, map_location="cpu", weights_only=True)
