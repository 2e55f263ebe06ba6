"""Find out what is wrong with the batch norms of a model."""

from jaxbn.health._check import check as check
from jaxbn.health._finding import Finding as Finding
from jaxbn.health._report import LayerRow as LayerRow
from jaxbn.health._report import Report as Report
from jaxbn.health._updated import assert_updated as assert_updated

__all__ = ["Finding", "LayerRow", "Report", "assert_updated", "check"]
