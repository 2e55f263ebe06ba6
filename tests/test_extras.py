"""Examples whose extra is not installed say so in one line."""

import pytest

from tests.missing_package import assert_refused, run_without
from train_examples.common.errors import needs_extra


@pytest.mark.parametrize(
    ("package", "example", "argv"),
    [
        ("rich", "digits", ()),
        ("rich", "digits", ("--help",)),
        ("orbax", "fold", ("--help",)),
        ("matplotlib", "questions", ("--help",)),
        ("optax", "recalibrate", ("--help",)),
        ("optax", "recalibrate.ema", ("--help",)),
        ("rich", "recalibrate.passes", ("--help",)),
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


def test_a_missing_module_of_this_project_raises():
    with pytest.raises(ModuleNotFoundError, match="train_examples"), needs_extra("test"):
        raise ModuleNotFoundError("No module named 'train_examples.x'", name="train_examples.x")
