"""The example with few images in a batch: its command, and what its networks compute."""

import contextlib
import io
import re

import numpy as np
import pytest

from train_examples.small_batches import __main__ as command
from train_examples.small_batches.train import METHODS, NETWORKS


def test_prints_and_draws_what_it_measures(tmp_path):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        argv = ["--epochs", "1", "--seeds", "1", "--sizes", "16", "--out", str(tmp_path)]
        accuracies = command.main(argv)
    assert accuracies.shape == (len(NETWORKS), len(METHODS), 1, 1)
    # Guessing is right in a tenth of the cases.
    assert accuracies.min() > 0.5
    # The methods are different ones.
    assert all(len(np.unique(of_network)) > 1 for of_network in accuracies)
    for accuracy in accuracies.flat:
        assert f"{accuracy:.2%}" in re.sub(r"\s+", " ", printed.getvalue())
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--epochs", "0"], "error: --epochs must be at least 1, got 0."),
        (["--sizes", "1", "8"], "error: --sizes must be at least 2, got 1."),
        (["--sizes", "2", "65"], "error: --sizes must be at most 64, got 65."),
    ],
)
def test_bad_options(argv, text):
    with pytest.raises(SystemExit) as exit_info:
        command.main(argv)
    assert str(exit_info.value) == text
