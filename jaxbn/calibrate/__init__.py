"""Exact running statistics: of a whole data set, or merged from those of shards."""

from jaxbn.calibrate._merge import merge as merge
from jaxbn.calibrate._recalibrate import recalibrate as recalibrate

__all__ = ["merge", "recalibrate"]
