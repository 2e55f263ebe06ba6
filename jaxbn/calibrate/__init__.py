"""Compute exact running statistics of a whole data set, or merge those of its shards."""

from jaxbn.calibrate._merge import merge as merge
from jaxbn.calibrate._recalibrate import recalibrate as recalibrate

__all__ = ["merge", "recalibrate"]
