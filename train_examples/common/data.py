"""Data sets as NumPy arrays, and their batches for training and evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from train_examples.common.cifar10 import read_cifar10
from train_examples.common.errors import UserError
from train_examples.common.mnist import read_mnist

TEST_FRACTION = 0.2
SPLIT_SEED = 0


class Dataset(NamedTuple):
    """Images, float32 of shape (N, height, width, channels) in [0, 1], and labels, int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Return a dataset by its name, from the files in `data_dir` or from scikit-learn."""
    if name == "digits":
        return digits()
    if data_dir is None:
        raise UserError(f"the dataset {name} needs data_dir, the folder of its files.")
    read = {"mnist": read_mnist, "cifar10": read_cifar10}[name]
    train_images, train_labels, test_images, test_labels = read(data_dir)
    return Dataset(
        train_images.astype(np.float32) / 255,
        train_labels.astype(np.int32),
        test_images.astype(np.float32) / 255,
        test_labels.astype(np.int32),
    )


def digits() -> Dataset:
    """Return 1797 scans of 8 x 8 pixels, split in the same way for every seed of a run."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(images)), test_size=TEST_FRACTION, stratify=labels, random_state=SPLIT_SEED
    )
    return Dataset(images[train], labels[train], images[test], labels[test])


def training_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield an epoch of shuffled, augmented batches, which depend on `seed` and `epoch` alone.

    A run that is resumed after an epoch thus gets the same batches as one that is not stopped.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    # The rest is dropped: another shape would compile the step again, and the statistics of a few
    # images would be poor. The next epoch drops other images.
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        yield shifted(images[batch], rng), labels[batch]


def evaluation_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield all images once, in order, as images, labels and a mask that is False for padding.

    The batches are as equal in size as possible, and padded to one shape, so that evaluation
    compiles once and no batch is too small for statistics of its own.
    """
    total = len(images)
    count = -(-total // batch_size)
    size = -(-total // count)
    for start in range(0, total, size):
        index = np.arange(start, start + size)
        mask = index < total
        index = np.minimum(index, total - 1)
        yield images[index], labels[index], mask


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return each image shifted by up to one pixel in each direction, with zeros shifted in."""
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    top, left = rng.integers(0, 3, (2, n))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
