"""Compare two layers, or two networks: by how much they differ, where first, and why."""

from jaxbn.parity._compare.accuracy import compare_accuracy as compare_accuracy
from jaxbn.parity._compare.accuracy_report import AccuracyReport as AccuracyReport
from jaxbn.parity._compare.accuracy_report import AccuracyRow as AccuracyRow
from jaxbn.parity._compare.layers import assert_parity as assert_parity
from jaxbn.parity._compare.layers import compare as compare
from jaxbn.parity._compare.models import compare_models as compare_models
from jaxbn.parity._compare.report import Report as Report
from jaxbn.parity._compare.report import Row as Row
