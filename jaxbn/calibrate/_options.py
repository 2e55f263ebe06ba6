"""The options of `recalibrate` that do not concern the model."""

from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbn import _checks
from jaxbn._running import Estimator
from jaxbn.calibrate._progress import Report


class Options(NamedTuple):
    """The options of `recalibrate`, which documents them."""

    processes: Literal["separate", "together"]
    passes: int | None
    running_variance: Estimator | None
    progress: bool | Report

    def check(self) -> None:
        """Raise an error that names the first option with a wrong value."""
        if self.processes not in ("separate", "together"):
            raise ValueError(
                f"processes must be 'separate' or 'together', got {self.processes!r}. {_HINT}"
            )
        if self.passes is not None and not _is_positive_integer(self.passes):
            raise ValueError(
                f"passes must be None or an integer of at least 1, got {self.passes!r}. {_HINT}"
            )
        if self.running_variance is not None:
            _checks.estimator("running_variance", self.running_variance)
        if not (isinstance(self.progress, bool) or callable(self.progress)):
            raise TypeError(
                f"progress must be a bool or a function, got {self.progress!r}. {_HINT}"
            )


_HINT = "To pass the model an argument of this name, make each batch a dict of keyword arguments."


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)
