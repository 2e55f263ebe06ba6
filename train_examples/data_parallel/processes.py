"""A process of several, which compute together: how it joins the others, and how it ends."""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.errors import JaxRuntimeError

from train_examples.data_parallel.config import Config
from train_examples.digits.config import UserError

# Seconds. By the first, all processes must have started. One that has not been heard of for the
# second is lost. At its end, a process waits for the others for the third.
JOIN = 120
HEARTBEAT = 20
SHUTDOWN = 20

# Exit statuses of a process: an error of its own, unforeseen or explained; it cannot go on without
# another process; its launcher has let go of it.
FAILED = 1
EXPLAINED = 2
LOST = 3
ALONE = 4


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """This process as one of those of `config`, from before any use of a device."""
    # Between CPUs; other devices have collectives of their own.
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
        # A regular exit would wait for the others, which are gone, or wait for this one.
        if is_of_a_collective(error):
            reason = str(error).splitlines()[0]
            print(f"process {config.process_id}: {reason}", file=sys.stderr, flush=True)
            os._exit(LOST)
        traceback.print_exc()
        os._exit(FAILED)


def is_of_a_collective(error: Exception) -> bool:
    """Whether an exception tells that this process and others could not compute together."""
    # Outside of `jit`, a collective that fails is a ValueError.
    return isinstance(error, JaxRuntimeError) or "Gloo" in str(error)


def end_with_launcher() -> None:
    """Ends this process as soon as the one that launched it ends, whatever ended that.

    The launcher holds the other end of standard input, and writes nothing into it.
    """

    def wait() -> None:
        os.read(0, 1)
        # From a thread there is no other way out of a collective that waits for lost processes.
        os._exit(ALONE)

    threading.Thread(target=wait, daemon=True).start()
