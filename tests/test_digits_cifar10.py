"""The reader of CIFAR-10's files: intact, damaged and hostile ones."""

import pickle
import struct

import numpy as np
import pytest

from tests.file_outcome import outcome
from train_examples.common import cifar10, data
from train_examples.common.errors import UserError

CIFAR_IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)


def python2_pickle(images, labels):
    """Return a batch as Python 2 wrote it: protocol 2, byte strings, NumPy's old modules."""

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


def test_cifar10_that_cannot_be_read(tmp_path):
    path = tmp_path / "batch"
    text, _ = outcome(cifar10.read_batch, path)
    assert text == f"{path} cannot be read: No such file or directory."


def test_cifar10_too_large(tmp_path):
    path = tmp_path / "batch"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    text, _ = outcome(cifar10.read_batch, path)
    assert text == f"{path} has 268435457 bytes; a batch of CIFAR-10 has about 31 million."


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
    """An object that creates a file when `pickle` loads it."""

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


# The pixels, which may have any value, and copies of them; and the objects of 1016 opcodes.
MOST_MEMORY = 8 * CIFAR_IMAGES.size + 2**18


@pytest.mark.parametrize(
    "content",
    [
        # NumPy crashes on these states of a dtype.
        PICKLE.replace(b"U\1|NNN", b"U\1|NN0"),
        PICKLE.replace(b"U\1|NNN", b"U\1|\x88N0"),
        PICKLE.replace(b"\xff\xff\xff\xffK\0tb\x89", b"\xff\xff\xff\xffK\x3ftb\x89"),
        # A memo index for which `pickle` would allocate a table.
        b"\x80\x02Nr\0\0\0\4.",
        # Sizes that the file does not hold.
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
    """Yield files that differ from `content` in a few bytes, or in their length."""
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
    # Both are common: a change may hit a label, or a name that the reader does not need.
    assert read > 20 and refused > 500
