"""One of several processes that compute together: how it joins the others, and how it ends."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.errors import JaxRuntimeError

from train_examples.common.errors import UserError
from train_examples.data_parallel.config import Config

# In seconds: the time in which all processes must start, the time without a heartbeat after which a
# process counts as lost, and the time that a process waits for the others at its end.
JOIN = 120
HEARTBEAT = 20
SHUTDOWN = 20

# Exit statuses of a process: an unexpected error; an error that it has explained; another process
# is lost; its launcher is gone.
FAILED = 1
EXPLAINED = 2
LOST = 3
ALONE = 4


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """Join the processes of `config` for the block. No device may have been used before."""
    # For CPUs; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
        yield
    except UserError:
        raise
    except Exception as error:
        # A regular exit would wait for the other processes, which are gone or wait for this one.
        if is_of_a_collective(error):
            reason = str(error).splitlines()[0]
            print(f"process {config.process_id}: {reason}", file=sys.stderr, flush=True)
            os._exit(LOST)
        traceback.print_exc()
        os._exit(FAILED)


def is_of_a_collective(error: Exception) -> bool:
    """Return whether an exception comes from a collective of several processes."""
    # Outside of `jit`, a collective that fails raises a ValueError.
    return isinstance(error, JaxRuntimeError) or "Gloo" in str(error)


def end_with_launcher() -> None:
    """End this process as soon as its launcher ends, for whatever reason.

    The launcher holds the other end of standard input, and writes nothing to it.
    """

    def wait() -> None:
        os.read(0, 1)
        # Nothing else ends a main thread that waits in a collective for lost processes.
        os._exit(ALONE)

    threading.Thread(target=wait, daemon=True).start()
