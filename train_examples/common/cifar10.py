"""Read the Python batches of CIFAR-10, which are pickles, without running any code in them."""

from pathlib import Path
from typing import Any

import numpy as np

from train_examples.common.errors import UserError
from train_examples.common.pickles import Call, NotAllowed, read_pickle

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
FOLDER = "cifar-10-batches-py"
PIXELS = 3 * 32 * 32
# In bytes: many times the size of a batch, and small enough for any memory.
LARGEST = 2**28

# The functions by which NumPy 1 and 2 pickle an array: up to protocol 4, and from 5 on.
RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
FROM_BUFFER = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
TYPES = ("numpy.ndarray", "numpy.dtype")


def read_cifar10(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images, uint8 of shape (N, 32, 32, 3), and labels: training, then test."""
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
    """Return the images and labels of one file."""
    batch = _read(path)
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise UserError(f"{path} must hold a dict with the keys b'data' and b'labels'.")
    try:
        data = _matrix(batch[b"data"])
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from None
    labels = batch[b"labels"]
    if not (isinstance(labels, list) and len(labels) == len(data)):
        raise UserError(f"{path}: b'labels' must be a list of {len(data)}, one for each image.")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise UserError(f"{path}: b'labels' must be integers from 0 to 9.")
    # Channels come first in the file, and last in Flax.
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.uint8)


def _concatenated(folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(read_batch(folder / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _read(path: Path) -> Any:
    """Return what the pickle in a file holds."""
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise UserError(f"{path} has {size} bytes; a batch of CIFAR-10 has about 31 million.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    # For each image there is a label and a file name, with up to four opcodes each.
    most_opcodes = 1000 + 8 * (len(data) // PIXELS)
    try:
        return read_pickle(data, (*RECONSTRUCT, *FROM_BUFFER, *TYPES), most_opcodes)
    except NotAllowed as error:
        raise UserError(
            f"{path} asks for {str(error)[:100]!a}, which no file of CIFAR-10 needs and which "
            f"could run code; it was not loaded."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged or not a pickle: {error}.") from None


def _matrix(value: Any) -> np.ndarray:
    """Return the array that recorded calls of NumPy's functions describe."""
    match value:
        case Call(function, _, (_, shape, dtype, fortran, contents)) if function in RECONSTRUCT:
            order = "F" if fortran else "C"
        case Call(function, (contents, dtype, shape, letter)) if function in FROM_BUFFER:
            order = "F" if letter == b"F" else "C"
        case _:
            raise ValueError("b'data' must be a matrix of unsigned bytes")
    match dtype, shape, contents:
        case Call("numpy.dtype", (b"u1", *_)), (int(rows), int(columns)), bytes():
            pass
        case Call("numpy.dtype", (bytes(name), *_)), _, _ if name != b"u1":
            raise ValueError(f"b'data' must have the dtype b'u1', it has {name[:20]!r}")
        case _:
            raise ValueError("b'data' must be a matrix of unsigned bytes")
    if columns != PIXELS or rows < 1:
        raise ValueError(f"b'data' must have the shape (N, {PIXELS}), it has {(rows, columns)}")
    if len(contents) != rows * columns:
        raise ValueError(
            f"b'data' needs {rows * columns} bytes for its shape {(rows, columns)}, it has "
            f"{len(contents)}"
        )
    return np.frombuffer(contents, np.uint8).reshape((rows, columns), order=order)
