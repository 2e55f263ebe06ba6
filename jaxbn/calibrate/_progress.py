"""Show how far the passes over the batches have come."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax

# Takes the number of the pass, of how many, the number of the batch, and of how many if known.
Report = Callable[[int, int, int, int | None], Any]


def ignore(number: int, passes: int, batch: int, batches: int | None) -> None:
    """Report nothing."""


def reporting(progress: bool | Report) -> AbstractContextManager[Report]:
    """Return a context that yields the function to call after each batch.

    Args:
      progress: that function; or whether to show a bar on stderr. If there are several processes,
        the first one shows it.
    """
    if callable(progress):
        return nullcontext(progress)
    return _bar() if progress and jax.process_index() == 0 else nullcontext(ignore)


def _bar() -> AbstractContextManager[Report]:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs the package rich, which is not installed: pip install rich, or "
            "pass a function that shows the progress.",
            name=error.name,
        ) from error

    @contextmanager
    def shown() -> Iterator[Report]:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("pass 1", total=None)

            def report(number: int, passes: int, batch: int, batches: int | None) -> None:
                known = batches is not None
                bar.update(
                    task,
                    description=f"pass {number} of {passes}",
                    completed=(number - 1) * batches + batch if known else batch,
                    total=passes * batches if known else None,
                )

            yield report
            # The passes may have ended before the last one.
            bar.update(task, total=bar.tasks[0].completed)

    return shown()
