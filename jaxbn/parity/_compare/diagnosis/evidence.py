"""Define what the search for reasons starts from, and what it finds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.parity._compare.diagnosis.fits import NormalizationFit, RunningFit
from jaxbn.parity._compare.recording import Batch, Recording

# Fits average their errors, and rows take the largest: a fit may miss by this many tolerances.
SLACK = 10
# The rounding error of E[x^2] - E[x]^2 is about this many last places of the squared mean.
LAST_PLACES = 8
ROLES = ("candidate", "reference")
RUNNING = {"running mean", "running var"}
OUTPUTS = {"y", "dx", "dscale", "dbias", "evaluation y"}


class Evidence(NamedTuple):
    """What is known about one layer.

    Attributes:
      recording: what it returned.
      tolerance: the relative error that its rounding explains.
      rounded_to: the half-precision dtype that its outputs are rounded to, if any.
      running: the fit to its running statistics, if one explains them.
      normalization: the fit to its outputs, if one explains them.
      unexplained: the quantities that these fits do not predict.
    """

    recording: Recording
    tolerance: float
    rounded_to: str | None
    running: RunningFit | None
    normalization: NormalizationFit | None
    unexplained: set[str]


class Reason(NamedTuple):
    """A reason for a difference, in words, and the quantities that it explains."""

    text: str
    explains: set[str]


Finder = Callable[[Evidence, Evidence, Sequence[Batch]], list[Reason]]


def prone_to_cancellation(batches: Sequence[Batch], rtol: float, last_place: float) -> np.ndarray:
    """Return which features lose more than `rtol` of their variance to `E[x^2] - E[x]^2`."""
    losses = [LAST_PLACES * last_place * batch.mean_over_std**2 for batch in batches]
    return np.max(losses, 0) > rtol
