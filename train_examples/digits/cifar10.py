"""Reads the Python batches of CIFAR-10, which are pickles, without running what is in them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from train_examples.digits.config import UserError

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
FOLDER = "cifar-10-batches-py"
PIXELS = 3 * 32 * 32


def read_cifar10(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, uint8 of shape (N, 32, 32, 3), and labels: training, then test."""
    folder = data_dir / FOLDER if (data_dir / FOLDER).is_dir() else data_dir
    missing = [name for name in TRAIN + TEST if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"not found in {folder}: {', '.join(missing)}. They are the files of the Python "
            f"version of CIFAR-10 by Krizhevsky; unpack its archive, and give the folder that "
            f"holds {FOLDER} as --data-dir."
        )
    return *_concatenated(folder, TRAIN), *_concatenated(folder, TEST)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one file."""
    try:
        with path.open("rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(f"{path} is damaged or not a pickle: {error}.") from None

    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise UserError(f"{path} must hold a dict with the keys b'data' and b'labels'.")
    data, labels = batch[b"data"], batch[b"labels"]
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2):
        raise UserError(f"{path}: b'data' must be a matrix of unsigned bytes.")
    if data.shape[1] != PIXELS or len(data) == 0:
        raise UserError(f"{path}: b'data' must have the shape (N, {PIXELS}), it has {data.shape}.")
    if not (isinstance(labels, list) and len(labels) == len(data)):
        raise UserError(f"{path}: b'labels' must be a list of {len(data)}, one for each image.")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise UserError(f"{path}: b'labels' must be integers from 0 to 9.")
    # Colours come first in the file, and last in Flax.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.uint8)


def _concatenated(folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(read_batch(folder / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _dtype(name: bytes | str, align: Any = False, copy: Any = False) -> np.dtype:
    """`numpy.dtype` of unsigned bytes alone.

    Always a copy, as the pickle goes on to set its state; and with a bool for `align`, in place of
    which old pickles have a number, which NumPy 2.4 deprecates.
    """
    if name not in (b"u1", "u1"):
        raise UserError(f"asks for the dtype {name!r}; CIFAR-10 needs unsigned bytes alone.")
    return np.dtype("u1", align=False, copy=True)


# NumPy's modules have moved since those pickles were written, and the old name warns.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
}


class _Unpickler(pickle.Unpickler):
    """Builds arrays, and refuses everything else that a pickle could call."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise UserError(
                f"asks for {module_name}.{global_name}, which no file of CIFAR-10 needs and which "
                f"could run code; it was not loaded."
            ) from None
