"""Read the files that `torch.save` writes."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn.convert import _entries
from jaxbn.health._command.errors import CheckpointError, Wanted

# In earlier versions, a file can run code despite `weights_only` (CVE-2025-32434,
# CVE-2026-24747).
_SAFE_VERSION = (2, 10)


def read(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """Return the wanted tensors of a file, which may be in nested mappings and sequences.

    A name consists of the keys on the path to the tensor, joined by dots. The order is that of the
    file; in a state dict, this is the order of the layers.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"PyTorch is needed to read {path}, which is neither a directory nor a .safetensors "
            f"file: pip install torch"
        ) from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _SAFE_VERSION:
        least = ".".join(map(str, _SAFE_VERSION))
        raise CheckpointError(
            f"PyTorch {torch.__version__} may run code contained in {path}, but version {least} "
            f"does not: pip install 'torch>={least}'"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _without_advice(path, error) from None
    return {
        name: np.asarray(_entries.array(tensor))
        for name, tensor in _tensors(loaded, torch.Tensor)
        if wanted(name)
    }


def _without_advice(path: Path, error: Exception) -> Exception:
    """Replace an error of PyTorch, whose message may suggest running the code in the file."""
    code = re.search(r"GLOBAL (\S+)|TorchScript", str(error))
    if code:
        return CheckpointError(
            f"{path} contains more than tensors ({code[1] or code[0]}), and loading it could run "
            f"code; save the model's state_dict() instead"
        )
    if isinstance(error, RuntimeError) and "weights_only" not in str(error):
        return error
    return CheckpointError(f"{path} is damaged or was not written by torch.save")


def _tensors(loaded: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the tensors in nested mappings and sequences in order, with their names."""
    visited: set[int] = set()
    remaining = [("", loaded)]
    while remaining:
        name, value = remaining.pop()
        if isinstance(value, kind):
            yield name, value
        # A mapping in a file can contain itself.
        elif isinstance(value, Mapping | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            prefix = f"{name}." if name else ""
            remaining += [(f"{prefix}{key}", item) for key, item in reversed(list(items))]
