"""Exchange statistics between the processes of a program."""

import json
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxbn.calibrate._observe import PerCall
from jaxbn.calibrate._statistics import Statistics


class Message(NamedTuple):
    """What a process sends to all processes.

    Attributes:
      statistics: statistics of calls, several of them or none.
      digest: a text that should be the same on all processes.
      error: the text of the error that kept the process from sending anything else, or "".
      process: the process's index.
    """

    statistics: Sequence[PerCall[Statistics]] = ()
    digest: str = ""
    error: str = ""
    process: int = 0


def exchange(encoded: bytes) -> list[Message]:
    """Return the messages of all processes, in the same order on all of them.

    It waits for all processes, so each of them must call it.

    Args:
      encoded: the message of this process, from `encode`.
    """
    # Only arrays of one shape can be gathered, and JAX would round float64.
    sizes = process_allgather(np.asarray([len(encoded)], np.uint32))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    rows = process_allgather(padded)
    messages = [_decode(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    return sorted(messages, key=lambda message: message.process)


def encode(message: Message) -> bytes:
    """Return the message of this process as bytes."""
    paths = [
        [[list(layer), len(of_layer)] for layer, of_layer in calls.items()]
        for calls in message.statistics
    ]
    header = json.dumps([paths, message.digest, message.error, jax.process_index()])
    arrays = [
        array
        for calls in message.statistics
        for of_layer in calls.values()
        for call in of_layer
        for array in call
    ]
    file = BytesIO()
    np.savez(file, *arrays, header=np.asarray(header))
    return file.getvalue()


def _decode(encoded: bytes) -> Message:
    with np.load(BytesIO(encoded), allow_pickle=False) as file:
        paths, digest, error, process = json.loads(file["header"].item())
        arrays = iter([file[f"arr_{i}"] for i in range(len(file.files) - 1)])

    def next_call() -> Statistics:
        return Statistics(*(next(arrays) for _ in Statistics._fields))

    statistics = [
        {tuple(layer): tuple(next_call() for _ in range(calls)) for layer, calls in of_layers}
        for of_layers in paths
    ]
    return Message(statistics, digest, error, process)
