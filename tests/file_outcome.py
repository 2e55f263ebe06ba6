"""The outcome of reading a file, and the memory that it takes."""

import tracemalloc

from train_examples.common.errors import UserError


def outcome(read, *args):
    """Return what `read` returns, or the text of its `UserError`, and its peak memory in bytes."""
    tracemalloc.start()
    try:
        return read(*args), tracemalloc.get_traced_memory()[1]
    except UserError as error:
        return str(error), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
