"""Examples whose extra is not installed say so in one line."""

import pytest

from tests.missing_package import assert_refused, run_without


@pytest.mark.parametrize(
    ("package", "example", "argv"),
    [
        ("rich", "digits", ()),
        ("rich", "digits", ("--help",)),
        ("orbax", "fold", ("--help",)),
        ("matplotlib", "questions", ("--help",)),
        ("optax", "recalibrate", ("--help",)),
        ("sklearn", "small_batches", ("--help",)),
        ("sklearn", "data_parallel", ()),
    ],
)
def test_an_example_names_its_extra(package, example, argv):
    assert_refused(run_without(package, f"train_examples.{example}", *argv), package, "examples")


def test_the_help_of_data_parallel_needs_no_package():
    run = run_without("rich", "train_examples.data_parallel", "--help")
    assert (run.returncode, run.stderr) == (0, "")
    assert "--coordinator HOST:PORT" in run.stdout
