"""The data of the examples: batches, and the reader of MNIST's files."""

import gzip
import struct

import numpy as np
import pytest

from tests.file_outcome import outcome
from train_examples.common import data, mnist
from train_examples.common.errors import UserError

RNG = np.random.default_rng(0)
MNIST_IMAGES = RNG.integers(0, 256, (7, 28, 28), np.uint8)


# Batches.


def test_digits_are_split_in_the_same_way_every_time():
    dataset = data.digits()
    again = data.digits()
    assert dataset.train_images.shape == (1437, 8, 8, 1)
    assert dataset.test_images.shape == (360, 8, 8, 1)
    assert dataset.train_images.min() == 0 and dataset.train_images.max() == 1
    assert set(np.bincount(dataset.test_labels)) == {35, 36, 37}
    np.testing.assert_array_equal(dataset.test_images, again.test_images)


def test_training_batches_are_a_function_of_seed_and_epoch():
    images = RNG.random((10, 8, 8, 1), np.float32)
    labels = np.arange(10, dtype=np.int32)

    def epoch(seed, number):
        return list(data.training_batches(images, labels, 4, seed, number))

    first, same = epoch(0, 3), epoch(0, 3)
    assert [x.shape for x, _ in first] == [(4, 8, 8, 1)] * 2
    for (x, y), (x2, y2) in zip(first, same, strict=True):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)
    seen = np.concatenate([y for _, y in first])
    assert len(set(seen)) == 8
    for other in (epoch(0, 4), epoch(1, 3)):
        assert not np.array_equal(seen, np.concatenate([y for _, y in other]))


def test_shifts_move_by_a_pixel_at_most():
    images = np.zeros((200, 5, 5, 2), np.float32)
    images[:, 2, 2] = 1, 2
    moved = data.shifted(images, np.random.default_rng(0))
    np.testing.assert_array_equal(moved.sum((1, 2)), images.sum((1, 2)))
    _, rows, columns = np.nonzero(moved[..., 0])
    assert set(zip(rows, columns, strict=True)) == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


@pytest.mark.parametrize("total, batch_size, size", [(10, 4, 4), (9, 4, 3), (3, 8, 3), (4, 4, 4)])
def test_evaluation_batches_show_each_image_once(total, batch_size, size):
    images, labels = np.arange(total)[:, None], np.arange(total)
    batches = list(data.evaluation_batches(images, labels, batch_size))
    assert {len(y) for _, y, _ in batches} == {size}
    np.testing.assert_array_equal(np.concatenate([y[m] for _, y, m in batches]), labels)
    np.testing.assert_array_equal(np.concatenate([x[m] for x, _, m in batches]), images)


# MNIST.


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, compressed=False):
    contents = {
        mnist.TRAIN[0]: MNIST_IMAGES[:5],
        mnist.TRAIN[1]: np.arange(5, dtype=np.uint8),
        mnist.TEST[0]: MNIST_IMAGES[5:],
        mnist.TEST[1]: np.array([9, 0], np.uint8),
    }
    for name, array in contents.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_round_trips(tmp_path, compressed):
    write_mnist(tmp_path, compressed)
    dataset = data.load("mnist", tmp_path)
    assert dataset.train_images.shape == (5, 28, 28, 1)
    assert dataset.train_images.dtype == np.float32
    images = np.concatenate([dataset.train_images, dataset.test_images])[..., 0]
    np.testing.assert_array_equal(np.rint(images * 255), MNIST_IMAGES)
    np.testing.assert_array_equal(dataset.train_labels, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(dataset.test_labels, [9, 0])


def test_mnist_missing(tmp_path):
    write_mnist(tmp_path)
    for name in mnist.TEST:
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        data.load("mnist", tmp_path)
    assert str(error.value) == (
        f"not found in {tmp_path}, neither plain nor with .gz: t10k-images-idx3-ubyte, "
        f"t10k-labels-idx1-ubyte. They are the files of the MNIST database of handwritten digits "
        f"by LeCun, Cortes and Burges; put all four into the folder that --data-dir names."
    )


IDX = idx(MNIST_IMAGES[:5])


@pytest.mark.parametrize(
    "content, message",
    [
        (
            IDX[:-1],
            "is truncated: the shape (5, 28, 28) in its header needs 3936 bytes, it has 3935",
        ),
        (IDX + b"\0", "is too long: the shape (5, 28, 28) in its header needs 3936 bytes"),
        (IDX[:9], "is truncated: it ends in its header, after 9 bytes."),
        (b"", "it begins with nothing, not 00 00 08 03"),
        (b"\0\0\x0d\3" + IDX[4:], "it begins with 00 00 0d 03, not 00 00 08 03"),
        # Headers that claim more than any memory holds, or than NumPy can express.
        (
            b"\0\0\x08\3" + b"\xff" * 12,
            "is too large: the shape (4294967295, 4294967295, 4294967295) in its header needs "
            "79228162458924105385300197391 bytes, at most 1073741824 are read.",
        ),
        (
            b"\0\0\x08\3" + b"\0" * 4 + b"\xff" * 8,
            "is empty: the shape in its header is (0, 4294967295, 4294967295).",
        ),
        (idx(np.zeros((5, 3, 3), np.uint8)), "must have images of shape (28, 28), it has (3, 3)"),
        (idx(MNIST_IMAGES[:4]), "they have 4 images and 5 labels"),
    ],
)
def test_mnist_malformed(tmp_path, content, message):
    write_mnist(tmp_path)
    (tmp_path / mnist.TRAIN[0]).write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load("mnist", tmp_path)
    assert message in str(error.value)
    assert mnist.TRAIN[0] in str(error.value)


TOO_LONG = gzip.compress(IDX + bytes(1000 * len(IDX)), mtime=0)
TOO_SHORT = gzip.compress(IDX[:-1], mtime=0)
# Declares ten thousand times as much as it has.
FALSE_HEADER = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 50_000, 28, 28) + IDX[16:], mtime=0)


@pytest.mark.parametrize(
    "content, message",
    [
        (TOO_LONG, "too long: the shape (5, 28, 28) in its header needs 3936 bytes, it has more."),
        (
            TOO_SHORT,
            "truncated: the shape (5, 28, 28) in its header needs 3936 bytes, it has 3935.",
        ),
        (
            FALSE_HEADER,
            f"truncated: the shape (50000, 28, 28) in its header needs 39200016 bytes, it has at "
            f"most {1032 * len(FALSE_HEADER)}.",
        ),
    ],
    ids=["too long", "too short", "false header"],
)
def test_mnist_reads_no_more_than_the_header_declares(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    text, allocated = outcome(mnist.read_idx, path, 3)
    assert text == f"{path} is {message}"
    # The buffers of gzip and of the file are smaller.
    assert allocated < 2**19


def test_mnist_that_cannot_be_read(tmp_path):
    text, _ = outcome(mnist.read_idx, tmp_path / "idx", 3)
    assert text == f"{tmp_path / 'idx'} cannot be read: No such file or directory."


def test_mnist_bad_label(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / mnist.TEST[1]).write_bytes(idx(np.array([3, 10], np.uint8)))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte must have labels from 0 to 9"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "content", [gzip.compress(IDX, mtime=0)[:-20], IDX, b"\x1f\x8b\x08\0" + b"\xff" * 40]
)
def test_mnist_damaged_gzip(tmp_path, content):
    write_mnist(tmp_path, compressed=True)
    path = tmp_path / f"{mnist.TRAIN[0]}.gz"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        data.load("mnist", tmp_path)
    assert str(error.value).startswith(f"{path} is damaged or not a gzip file: ")
