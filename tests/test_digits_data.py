"""The digits example's data: batches, and the readers of MNIST's and CIFAR-10's files."""

import gzip
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from train_examples.digits import cifar10, data, mnist
from train_examples.digits.config import UserError

RNG = np.random.default_rng(0)
MNIST_IMAGES = RNG.integers(0, 256, (7, 28, 28), np.uint8)
CIFAR_IMAGES = RNG.integers(0, 256, (3, 3, 32, 32), np.uint8)


def outcome(read, *args):
    """Return what `read` returns, or the text of its `UserError`, and its peak memory in bytes."""
    tracemalloc.start()
    try:
        return read(*args), tracemalloc.get_traced_memory()[1]
    except UserError as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Batches.


def test_digits_are_split_alike_every_time():
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
    # The buffers of gzip and of the file.
    assert allocated < 2**19


def test_data_that_cannot_be_read(tmp_path):
    for read, name in (
        (lambda path: mnist.read_idx(path, 3), "idx"),
        (cifar10.read_batch, "batch"),
    ):
        with pytest.raises(UserError) as error:
            read(tmp_path / name)
        reason = "No such file or directory"
        assert str(error.value) == f"{tmp_path / name} cannot be read: {reason}."


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


# CIFAR-10.


def python2_pickle(images, labels):
    """A batch byte by byte as Python 2 wrote it: protocol 2, byte strings, NumPy's old modules."""

    def string(value):
        return b"U" + bytes([len(value)]) + value

    pixels = images.tobytes()
    return b"".join(
        (
            b"\x80\x02}(",
            string(b"batch_label") + string(b"training batch 1 of 5"),
            string(b"labels") + b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e",
            string(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\nK\0\x85" + string(b"b") + b"\x87R",
            b"(K\1K" + bytes([len(images)]) + b"M\x00\x0c\x86",
            b"cnumpy\ndtype\n" + string(b"u1") + b"K\0K\1\x87R",
            b"(K\3" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
            b"\x89T" + struct.pack("<I", len(pixels)) + pixels + b"tb",
            b"u.",
        )
    )


PICKLE = python2_pickle(CIFAR_IMAGES, [1, 2, 3])


def write_cifar10(folder):
    folder.mkdir()
    for number, name in enumerate((*cifar10.TRAIN, *cifar10.TEST)):
        labels = [number, 9, 0]
        (folder / name).write_bytes(python2_pickle(CIFAR_IMAGES, labels))


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_round_trips(tmp_path, inside):
    folder = tmp_path / cifar10.FOLDER
    write_cifar10(folder)
    dataset = data.load("cifar10", folder if inside else tmp_path)
    assert dataset.train_images.shape == (15, 32, 32, 3)
    assert dataset.train_images.dtype == np.float32
    np.testing.assert_array_equal(
        np.rint(dataset.test_images.transpose(0, 3, 1, 2) * 255), CIFAR_IMAGES
    )
    np.testing.assert_array_equal(dataset.train_labels[::3], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(dataset.test_labels, [5, 9, 0])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("key", [bytes, bytes.decode], ids=["bytes", "str"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_cifar10_written_by_this_numpy(tmp_path, protocol, key, order):
    path = tmp_path / "batch"
    matrix = np.asarray(CIFAR_IMAGES.reshape(3, -1), order=order)
    batch = {key(b"data"): matrix, key(b"labels"): [0, 1, 2]}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    images, labels = cifar10.read_batch(path)
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), CIFAR_IMAGES)
    np.testing.assert_array_equal(labels, [0, 1, 2])


def test_cifar10_missing(tmp_path):
    folder = tmp_path / cifar10.FOLDER
    write_cifar10(folder)
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError) as error:
        data.load("cifar10", tmp_path)
    assert str(error.value) == (
        f"not found in {folder}: data_batch_3. They are the files of the Python version of "
        f"CIFAR-10 by Krizhevsky; unpack its archive, and give the folder that holds "
        f"cifar-10-batches-py as --data-dir."
    )


class Touch:
    """Unpickled as usual, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_pickle_runs_nothing(tmp_path):
    evidence = tmp_path / "evidence"
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": Touch(evidence), b"labels": []}, protocol=3))
    pickle.loads(path.read_bytes()).get(b"data").close()
    assert evidence.exists(), "the pickle is harmless, and the test shows nothing"
    evidence.unlink()

    with pytest.raises(UserError) as error:
        cifar10.read_batch(path)
    assert str(error.value).startswith(f"{path} asks for '")
    assert str(error.value).endswith(
        ".open', which no file of CIFAR-10 needs and which could run code; it was not loaded."
    )
    assert not evidence.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (PICKLE[:200], "is damaged or not a pickle: "),
        (b"", "is damaged or not a pickle: "),
        (b"hello", "is damaged or not a pickle: "),
        (python2_pickle(CIFAR_IMAGES, [1, 2]), "b'labels' must be a list of 3, one for each image"),
        (python2_pickle(CIFAR_IMAGES, [1, 2, 10]), "b'labels' must be integers from 0 to 9"),
        (pickle.dumps([1, 2]), "must hold a dict with the keys b'data' and b'labels'"),
        (pickle.dumps({b"labels": []}), "must hold a dict with the keys b'data' and b'labels'"),
        (pickle.dumps({b"data": 1, b"labels": []}), "b'data' must be a matrix of unsigned bytes"),
        (
            pickle.dumps({b"data": np.zeros((1, 3), np.uint8), b"labels": [0]}, protocol=3),
            "b'data' must have the shape (N, 3072), it has (1, 3)",
        ),
        (
            pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, protocol=3),
            "b'data' must have the dtype b'u1', it has b'f8'.",
        ),
        (
            PICKLE.replace(b"K\3M\x00\x0c", b"K\2M\x00\x0c"),
            "b'data' needs 6144 bytes for its shape (2, 3072), it has 9216.",
        ),
        (b"\x80\x02K\1u.", "is damaged or not a pickle: it ends a collection that it never began."),
        (
            b"\x80\x02K\1K\2s.",
            "is damaged or not a pickle: it needs bytes, it has int.",
        ),
        (
            b"\x80\x02h\5.",
            "is damaged or not a pickle: it refers to a value 5 that it never stored.",
        ),
        (b"\x80\x02}F1.5\n.", "is damaged or not a pickle: the opcode FLOAT is not supported."),
        (b"\x80\x02S'\\q'\n.", "is damaged or not a pickle: the opcode STRING is not supported."),
    ],
)
def test_cifar10_malformed(tmp_path, content, message):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        cifar10.read_batch(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


# The pixels, any of which is right, and what is copied of them; and the objects of 1016 opcodes.
MOST_MEMORY = 8 * CIFAR_IMAGES.size + 2**18


@pytest.mark.parametrize(
    "content",
    [
        # NumPy crashes on these states of a dtype.
        PICKLE.replace(b"U\1|NNN", b"U\1|NN0"),
        PICKLE.replace(b"U\1|NNN", b"U\1|\x88N0"),
        PICKLE.replace(b"\xff\xff\xff\xffK\0tb\x89", b"\xff\xff\xff\xffK\x3ftb\x89"),
        # The index of a memo, of which `pickle` makes a table.
        b"\x80\x02Nr\0\0\0\4.",
        # Sizes that the file does not have.
        b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x05\x96" + b"\0\0\0\0\1\0\0\0.",
        b"\x80\x02T\xff\xff\xff\x7f.",
        PICKLE.replace(b"K\3M\x00\x0c", b"J\xff\xff\xff\x7fM\x00\x0c"),
        # Values that take much more memory than the file.
        b"\x80\x04" + b"]" * 100_000,
        b"\x80\x04" + b"\x8f" * 100_000,
        b"\x80\x04" + b"(" * 100_000,
    ],
)
def test_cifar10_hostile(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    result, allocated = outcome(cifar10.read_batch, path)
    assert content != PICKLE
    assert isinstance(result, str) or np.array_equal(result[1], [1, 2, 3])
    assert allocated < MOST_MEMORY + len(content)


def damaged(content, rng):
    """Yields files that differ from `content` in a few bytes, or in their length."""
    start = content.index(CIFAR_IMAGES.tobytes())
    structure = [*range(start), *range(start + CIFAR_IMAGES.size, len(content))]
    for count in (1, 2, 4):
        for _ in range(300):
            changed = bytearray(content)
            for position in rng.choice(structure, count):
                changed[position] = rng.integers(256)
            yield bytes(changed)
    for position in rng.choice(structure, 100):
        yield content[:position]
        yield content[:position] + content[position + 1 :]
        yield content[:position] + rng.bytes(1) + content[position:]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar10_damaged(tmp_path, protocol):
    content = PICKLE
    if protocol > 2:
        batch = {b"labels": [1, 2, 3], b"data": CIFAR_IMAGES.reshape(3, -1)}
        content = pickle.dumps(batch, protocol=protocol)
    path = tmp_path / "batch"
    read = refused = 0
    for changed in damaged(content, np.random.default_rng(protocol)):
        path.write_bytes(changed)
        result, allocated = outcome(cifar10.read_batch, path)
        assert allocated < MOST_MEMORY
        if isinstance(result, str):
            assert result.startswith(str(path))
            refused += 1
        else:
            images, labels = result
            assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
            assert labels.shape == (3,) and labels.max() <= 9
            read += 1
    # Neither is rare: a change may fall on a label, or on a name that nothing needs.
    assert read > 20 and refused > 500
