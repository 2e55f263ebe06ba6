"""Images and labels as NumPy arrays, and the order in which an epoch shows them."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from train_examples.digits.cifar10 import read_cifar10
from train_examples.digits.config import UserError
from train_examples.digits.mnist import read_mnist

TEST_FRACTION = 0.2
SPLIT_SEED = 0


class Dataset(NamedTuple):
    """Images, float32 of shape (N, height, width, channels) in [0, 1], and labels, int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset of a name; from the files in `data_dir`, unless scikit-learn bundles it."""
    if name == "digits":
        return digits()
    if data_dir is None:
        raise UserError(f"the dataset {name} needs the folder of its files.")
    read = {"mnist": read_mnist, "cifar10": read_cifar10}[name]
    train_images, train_labels, test_images, test_labels = read(data_dir)
    return Dataset(
        train_images.astype(np.float32) / 255,
        train_labels.astype(np.int32),
        test_images.astype(np.float32) / 255,
        test_labels.astype(np.int32),
    )


def digits() -> Dataset:
    """1797 scans of 8 x 8 pixels; the split is the same for every seed of a run."""
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
    """An epoch of shuffled, augmented batches: a function of `seed` and `epoch` alone.

    So a run that resumes after an epoch sees what it would have seen without the stop.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(images))
    # What is left over at the end is dropped: a smaller batch would compile the step anew, and a
    # few images make poor statistics. The next epoch's shuffle drops others.
    for start in range(0, len(order) - batch_size + 1, batch_size):
        batch = order[start : start + batch_size]
        yield shifted(images[batch], rng), labels[batch]


def evaluation_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All images once, in order, as images, labels and a mask that is False over padding.

    The batches are as equal as they can be, and padded to one shape, so that evaluation compiles
    once and no batch is too small for statistics of its own.
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
    """Each image moved by up to a pixel in each direction, with zeros from outside."""
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    top, left = rng.integers(0, 3, (2, n))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
