"""Statistics of the data of all processes, each of which reads its own part."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import numpy as np

from jaxbn.calibrate._exchange import Message, encode, exchange
from jaxbn.calibrate._global_arrays import LocalBatches, local_copies, shared_like
from jaxbn.calibrate._observable import observable
from jaxbn.calibrate._observe import ObservableModel
from jaxbn.calibrate._options import Options
from jaxbn.calibrate._passes import Part, exact_statistics, repeatable
from jaxbn.calibrate._progress import reporting
from jaxbn.calibrate._replace import replaced

T = TypeVar("T")
Tree = TypeVar("Tree")


def recalibrate_together(
    model: Any,
    variables: Tree,
    batches: Iterable[Any],
    apply_kwargs: Mapping[str, Any],
    options: Options,
) -> Tree:
    """Return what `recalibrate` returns for the batches of all processes.

    Whatever may fail in one process alone runs in `_in_all`. The rest depends only on what all
    processes have received, so they stay in step.
    """

    def prepare() -> tuple[Message, tuple[ObservableModel, Iterable[Any], AbstractContextManager]]:
        observed = observable(model, variables, apply_kwargs)
        observed = observed._replace(variables=local_copies(observed.variables))
        digest = _digest(_parameters(observed.variables))
        own_batches = LocalBatches(repeatable(batches))
        return Message(digest=digest), (observed, own_batches, reporting(options.progress))

    def gather(step: Callable[[], Part]) -> list[Part]:
        messages, _ = _in_all(lambda: (Message(step()), None))
        return [message.statistics for message in messages]

    def finish() -> tuple[Message, Tree]:
        old = observed.statistics
        new = replaced(old, calls, options.running_variance)
        return Message(digest=_digest(new)), observed.replace_statistics(shared_like(old, new))

    messages, (observed, own_batches, shown) = _in_all(prepare)
    _check_variables(messages, "parameters")
    for name in ("passes", "running_variance"):
        text = str(getattr(options, name))
        messages, _ = _in_all(lambda text=text: (Message(digest=text), None))
        _check_option(name, messages)
    with shown as report:
        calls, _ = exact_statistics(
            observed, own_batches, gather, most_passes=options.passes, report=report
        )
    messages, new_variables = _in_all(finish)
    # Those that are replaced may differ before, as they do without a mapped axis in training.
    _check_variables(messages, "running statistics where they are kept")
    return new_variables


def _in_all(step: Callable[[], tuple[Message, T]]) -> tuple[list[Message], T]:
    """Run a step in all processes. If it fails in one of them, all raise an error.

    Args:
      step: returns what to send to the other processes, and a value to keep.

    Returns:
      The messages of all processes, and the value that this process keeps.
    """
    try:
        message, value = step()
        encoded = encode(message)
    except Exception as error:
        exchange(encode(Message(error=f"{type(error).__name__}: {error}")))
        raise
    messages = exchange(encoded)
    for message in messages:
        if message.error:
            raise RuntimeError(
                f"recalibrate failed in process {message.process} of {len(messages)}, which "
                f"raised {message.error}"
            )
    return messages, value


def _parameters(variables: Any) -> Any:
    """Return the parameters in the variables of an `ObservableModel`."""
    if isinstance(variables, Mapping):
        return variables.get("params", {})
    from flax import nnx

    return [state.filter(nnx.Param) for state in variables]


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _check_option(name: str, messages: list[Message]) -> None:
    """Check that an option is the same in all processes.

    With different `passes`, a process would wait for others that have finished.
    """
    if (other := _first_different(messages)) is not None:
        raise ValueError(
            f"{name} must be the same in all processes, got {other.digest} in process "
            f"{other.process} and {messages[0].digest} in process {messages[0].process}."
        )


def _check_variables(messages: list[Message], what: str) -> None:
    if (other := _first_different(messages)) is not None:
        raise ValueError(
            f"variables must have the same {what} in all processes, got others in process "
            f"{other.process} than in process {messages[0].process}: give all those of one, with "
            f"jax.experimental.multihost_utils.broadcast_one_to_all(variables)."
        )


def _first_different(messages: list[Message]) -> Message | None:
    """Return the first message whose digest is not that of the first process, or None."""
    return next((message for message in messages if message.digest != messages[0].digest), None)
