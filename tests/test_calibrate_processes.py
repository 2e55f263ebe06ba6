"""`recalibrate` over several processes, each of which reads its part of the data."""

import jax
import numpy as np
import pytest

from jaxbn.calibrate import recalibrate
from jaxbn.calibrate._exchange import Message, encode, exchange
from jaxbn.calibrate._statistics import Statistics
from tests import processes
from tests.calibration import TOLERANCE, data
from tests.calibration_processes import CASES, chain, one_layer, wanted
from tests.close import assert_close, assert_equal
from tests.processes import PROCESSES
from tests.raises import raises

IN_SECOND = f"RuntimeError: recalibrate failed in process 1 of {PROCESSES}, which raised "
WRONG_MODEL = (
    "TypeError: model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got "
    "NoneType."
)
NO_BATCH = "ValueError: batches must hold at least one batch, got none."
NO_DISK = "OSError: the disk is gone"
EXHAUSTED = (
    "ValueError: batches were exhausted by the first pass over them: give a list, or an iterable "
    "that starts again with each iter()."
)
DIFFERENT = (
    "ValueError: variables must have the same {} in all processes, got others in process 1 than in "
    "process 0: give all those of one, with "
    "jax.experimental.multihost_utils.broadcast_one_to_all(variables)."
)
OTHER_PARAMETERS = DIFFERENT.format("parameters")
OTHER_STATISTICS = DIFFERENT.format("running statistics where they are kept")
OTHER_OPTION = (
    "ValueError: {} must be the same in all processes, got {} in process 1 and None in process 0."
)
OTHER_PASSES = OTHER_OPTION.format("passes", 1)
OTHER_ESTIMATOR = OTHER_OPTION.format("running_variance", "biased")
NO_TERMINAL = "OSError: the terminal is gone"
NO_STATISTICS = (
    "ValueError: variables have no 'mean' and 'var' in BatchNorm_0. The running statistics are "
    "variables, too: in Linen, model.init makes 'batch_stats', which must be kept and saved with "
    "'params'."
)
SHARED_BATCHES = (
    "ValueError: batches must hold this process's part of the data, got an array of shape (40, 16) "
    "that is divided among processes: leave out processes='together', or give the rows of this "
    "process."
)
DIVIDED = (
    "ValueError: variables hold an array that is divided among the processes, at "
    "['batch_stats']['mean'] with shape (16,), but each process needs all of it: replicate the "
    "variables first, with jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))."
)
# The errors of both processes.
ERRORS = {
    "model": (IN_SECOND + WRONG_MODEL, WRONG_MODEL),
    "no batches": (NO_BATCH, NO_BATCH),
    "second pass": (IN_SECOND + NO_DISK, NO_DISK),
    "exhausted": (IN_SECOND + EXHAUSTED, EXHAUSTED),
    "parameters": (OTHER_PARAMETERS, OTHER_PARAMETERS),
    "statistics of a frozen layer": (OTHER_STATISTICS, OTHER_STATISTICS),
    "statistics of a layer in evaluation mode": (OTHER_STATISTICS, OTHER_STATISTICS),
    "statistics of a feature without values": (OTHER_STATISTICS, OTHER_STATISTICS),
    "passes": (OTHER_PASSES, OTHER_PASSES),
    "passes of other types": ("none", "none"),
    "running_variance": (OTHER_ESTIMATOR, OTHER_ESTIMATOR),
    "progress": (IN_SECOND + NO_TERMINAL, NO_TERMINAL),
    "no statistics": (IN_SECOND + NO_STATISTICS, NO_STATISTICS),
    "shared batches in together": (SHARED_BATCHES, SHARED_BATCHES),
    "divided variables": (DIVIDED, DIVIDED),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the arrays and texts that each process saved."""
    return processes.run("tests.calibrate_worker", tmp_path_factory.mktemp("calibrate"))


def leaves(results, name, count):
    """Return leaves that are the same bits in all processes."""
    for i in range(count):
        assert len({result[f"{name} {i}"].tobytes() for result in results}) == 1
    return [results[0][f"{name} {i}"] for i in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_processes_get_the_statistics_of_all_data(results, name):
    case = CASES[name]
    expected = wanted(case)
    assert_close(leaves(results, name, len(expected)), expected, TOLERANCE[case.dtype])


def test_statistics_are_exchanged_in_float64(results):
    # Two batches are merged in one order, whether by one process or by two.
    expected = wanted(CASES["one batch each"])
    assert_equal(leaves(results, "one batch each", len(expected)), expected)


def test_arrays_of_all_processes(results):
    layer, variables = one_layer()
    expected = jax.tree.leaves(recalibrate(layer, variables, [data(shape=(40, 16))]))
    for name in ("shared variables", "shared batches"):
        assert_close(leaves(results, name, len(expected)), expected, TOLERANCE["float32"])


def test_statistics_that_are_replaced_may_differ_before(results):
    network, variables = chain()
    expected = jax.tree.leaves(recalibrate(network, variables, [data()], train=True))
    got = leaves(results, "own statistics", len(expected))
    assert_close(got, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_one_process_is_an_error_in_all(results, name):
    assert tuple(str(result[name]) for result in results) == ERRORS[name]


def test_one_process_alone_is_all_processes():
    layer, variables = one_layer()
    batches = np.split(data(shape=(101, 16)), [40])
    together = recalibrate(layer, variables, batches, processes="together")
    assert_equal(together, recalibrate(layer, variables, batches))


def test_messages_arrive_as_they_are(rng):
    def statistics(shape, ddof):
        values = rng.normal(size=shape) / 3
        return Statistics(np.full(shape, 7.0), values, -values, np.asarray(ddof, np.int32))

    special = statistics((5,), 0)._replace(mean=np.asarray([np.nan, np.inf, -0.0, 5e-324, 1e308]))
    first = {("block", 0, "norm"): (statistics((3, 2), [1, 1, 1]), special), (): ()}
    message = Message([first, {}, {("0",): (statistics((0,), 1),)}], "digest", "an \N{SNOWMAN}")
    (got,) = exchange(encode(message))
    assert got._replace(statistics=()) == message._replace(statistics=())
    for got_calls, calls in zip(got.statistics, message.statistics, strict=True):
        assert list(got_calls) == list(calls)
        assert_equal(list(got_calls.values()), list(calls.values()))


def test_unknown_way():
    layer, variables = one_layer()
    with raises(
        ValueError,
        "processes must be 'separate' or 'together', got 2. To pass the model an argument of this "
        "name, make each batch a dict of keyword arguments.",
    ):
        recalibrate(layer, variables, [data(shape=(5, 16))], processes=2)  # type: ignore
