"""Reads the four IDX files of MNIST, plain or compressed."""

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from train_examples.digits.config import UserError

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_mnist(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, uint8 of shape (N, 28, 28, 1), and labels: training, then test."""
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
    """The unsigned bytes of an IDX file of a known number of axes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or not a gzip file: {error}.") from None
    # Two zeros, 8 for unsigned bytes, the number of axes; then sizes, big-endian.
    magic = bytes([0, 0, 8, rank])
    header = 4 + 4 * rank
    if data[:4] != magic:
        raise UserError(
            f"{path} is not an IDX file of unsigned bytes with {rank} axes: it begins with "
            f"{data[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}."
        )
    shape = tuple(int.from_bytes(data[start : start + 4], "big") for start in range(4, header, 4))
    wanted = header + int(np.prod(shape, dtype=object))
    if len(data) != wanted:
        raise UserError(
            f"{path} is {'truncated' if len(data) < wanted else 'too long'}: the shape {shape} in "
            f"its header needs {wanted} bytes, it has {len(data)}."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


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
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{images_name} and {labels_name} in {data_dir} must be of one length, and not empty: "
            f"they have {len(images)} images and {len(labels)} labels."
        )
    if labels.max() > 9:
        raise UserError(
            f"{paths[labels_name]} must have labels from 0 to 9, it has {labels.max()}."
        )
    return images[..., None], labels
