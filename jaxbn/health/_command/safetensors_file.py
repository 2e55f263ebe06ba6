"""Read safetensors files."""

from pathlib import Path

# NumPy finds bfloat16 by its name once this is imported.
import ml_dtypes  # noqa: F401
import numpy as np

from jaxbn.health._command.errors import Wanted, missing_package
from jaxbn.health._command.names import in_natural_order


def read(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """Return the wanted arrays of a file, by their names."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise missing_package("safetensors", str(path)) from None

    with safe_open(path, framework="np") as file:
        names = filter(wanted, file.keys())
        return in_natural_order({name: file.get_tensor(name) for name in names})
