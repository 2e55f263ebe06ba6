"""Read the four IDX files of MNIST, plain or compressed."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from train_examples.common.errors import UserError

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# The number of bytes of the magic number, and of each size after it.
HEADER = 4
# In bytes. The largest data set in this format, EMNIST, has half as many.
LARGEST = 2**30
# The largest compression ratio of Deflate: https://zlib.net/zlib_tech.html.
MOST_PER_COMPRESSED_BYTE = 1032


def read_mnist(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images, uint8 of shape (N, 28, 28, 1), and labels: training, then test."""
    found = {name: _find(data_dir, name) for name in TRAIN + TEST}
    paths = {name: path for name, path in found.items() if path is not None}
    missing = [name for name in found if name not in paths]
    if missing:
        raise UserError(
            f"not found in {data_dir}, neither plain nor with .gz: {', '.join(missing)}. They are "
            f"the files of the MNIST database of handwritten digits by LeCun, Cortes and Burges; "
            f"put all four into the folder that --data-dir names."
        )
    return *_split(data_dir, paths, *TRAIN), *_split(data_dir, paths, *TEST)


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file with `rank` axes.

    The header is read first. If the file is large enough for the shape in it, the values are read,
    and not more than these.
    """
    compressed = path.suffix == ".gz"
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            shape = _read_shape(file, path, rank)
            size = math.prod(shape)
            held = path.stat().st_size * (MOST_PER_COMPRESSED_BYTE if compressed else 1)
            needed = HEADER * (1 + rank) + size
            declared = f"the shape {shape} in its header needs {needed} bytes"
            if size > LARGEST:
                raise UserError(f"{path} is too large: {declared}, at most {LARGEST} are read.")
            if needed > held:
                at_most = "at most " if compressed else ""
                raise UserError(f"{path} is truncated: {declared}, it has {at_most}{held}.")
            # One more byte shows whether anything follows, and makes gzip compare its checksum.
            data = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or not a gzip file: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) < size:
        raise UserError(f"{path} is truncated: {declared}, it has {needed - size + len(data)}.")
    if len(data) > size:
        raise UserError(f"{path} is too long: {declared}, it has more.")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_shape(file: BinaryIO | gzip.GzipFile, path: Path, rank: int) -> tuple[int, ...]:
    """Return the shape in the header: two zeros, 8 for unsigned bytes, the rank, the sizes."""
    magic, wanted = file.read(HEADER), bytes([0, 0, 8, rank])
    if magic != wanted:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes with {rank} axes: it begins with "
            f"{magic.hex(' ') or 'nothing'}, not {wanted.hex(' ')}."
        )
    sizes = file.read(HEADER * rank)
    if len(sizes) < HEADER * rank:
        raise UserError(
            f"{path} is truncated: it ends in its header, after {HEADER + len(sizes)} bytes."
        )
    shape = struct.unpack(f">{rank}I", sizes)
    if 0 in shape:
        raise UserError(f"{path} is empty: the shape in its header is {shape}.")
    return shape


def _find(data_dir: Path, name: str) -> Path | None:
    candidates = (data_dir / name, data_dir / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _split(
    data_dir: Path, paths: Mapping[str, Path], images_name: str, labels_name: str
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(paths[images_name], 3), read_idx(paths[labels_name], 1)
    if images.shape[1:] != (28, 28):
        raise UserError(
            f"{paths[images_name]} must have images of shape (28, 28), it has {images.shape[1:]}."
        )
    if len(images) != len(labels):
        raise UserError(
            f"{images_name} and {labels_name} in {data_dir} must be equally long: they have "
            f"{len(images)} images and {len(labels)} labels."
        )
    if labels.max() > 9:
        raise UserError(
            f"{paths[labels_name]} must have labels from 0 to 9, it has {labels.max()}."
        )
    return images[..., None], labels
