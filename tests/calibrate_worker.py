"""Run one of the processes of test_calibrate_processes.py."""

import sys
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.calibrate import recalibrate
from tests.calibration import data
from tests.calibration_processes import CASES, chain, one_layer, recalibrated, two_layers
from tests.processes import join

together = partial(recalibrate, processes="together")


def main(coordinator: str, process: str, out: str) -> None:
    mesh, is_last = join(coordinator, int(process)), process == "1"
    # After the errors, the processes must still be in step.
    results = dict(errors(mesh, is_last))
    for name, case in CASES.items():
        got = recalibrated(case, case.parts[is_last], processes="together")
        results |= leaves(name, got)
    network, variables = chain()
    part = np.array_split(data(), 2)[is_last]
    got = together(network, own_statistics(variables, is_last), [part], train=True)
    results |= leaves("own statistics", got)
    layer, variables = one_layer()
    rows = global_array(data(shape=(40, 16)), mesh, P("data"))
    shared = jax.tree.map(lambda leaf: global_array(leaf, mesh, P()), variables)
    got = together(layer, shared, [rows_of_process(data(shape=(40, 16)), is_last)])
    assert all(leaf.sharding == NamedSharding(mesh, P()) for leaf in jax.tree.leaves(got))
    results |= leaves("shared variables", got)
    results |= leaves("shared batches", recalibrate(layer, shared, [rows]))
    np.savez(out, **results)


def errors(mesh, is_last):
    """Yield the error of each wrong call, which all processes make."""

    def error(name, function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except Exception as error:
            return name, f"{type(error).__name__}: {error}"
        return name, "none"

    network, variables = chain()
    batches, run = [data()], partial(together, network, train=True)
    yield error("model", together, None if is_last else network, variables, batches, train=True)
    yield error("no batches", run, variables, [])
    yield error("second pass", run, variables, Failing(batches, in_pass=2 if is_last else None))
    yield error("exhausted", run, variables, Once(batches) if is_last else batches)
    yield error("parameters", run, chain(key=int(is_last))[1], batches)
    yield error("passes", run, variables, batches, passes=1 if is_last else None)
    passes = np.int64(5) if is_last else 5
    yield error("passes of other types", run, variables, batches, passes=passes)
    estimator = "biased" if is_last else None
    yield error("running_variance", run, variables, batches, running_variance=estimator)
    yield error("progress", run, variables, batches, progress=failing if is_last else False)
    no_statistics = {"params": variables["params"]}
    yield error("no statistics", run, no_statistics if is_last else variables, batches)
    for name, (model, variables), batch in kept_statistics():
        yield error(name, together, model, own_statistics(variables, is_last), [batch])
    layer, variables = one_layer()
    rows = global_array(data(shape=(40, 16)), mesh, P("data"))
    yield error("shared batches in together", together, layer, variables, [rows])
    divided = jax.tree.map(lambda leaf: global_array(leaf, mesh, P("data")), variables)
    yield error("divided variables", together, layer, divided, [data(shape=(40, 16))])


def failing(*event):
    raise OSError("the terminal is gone")


class Failing:
    """Batches that cannot be read in one of the passes."""

    def __init__(self, batches, in_pass):
        self.batches, self.in_pass, self.passes = batches, in_pass, 0

    def __iter__(self):
        self.passes += 1
        if self.passes == self.in_pass:
            raise OSError("the disk is gone")
        return iter(self.batches)


class Once:
    """Batches that do not start again."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def kept_statistics():
    """Return calls that keep some running statistics: a name, a model, its variables, a batch."""
    x = data(shape=(40, 16))
    masked = {"x": x, "mask": np.arange(16) > 0}
    return [
        ("statistics of a frozen layer", two_layers(frozen=True), x),
        ("statistics of a layer in evaluation mode", two_layers(use_running_average=True), x),
        ("statistics of a feature without values", one_layer(), masked),
    ]


def own_statistics(variables, is_last):
    """Return variables whose running statistics differ between the processes."""
    statistics = jax.tree.map(lambda leaf: leaf + is_last, variables["batch_stats"])
    return {**variables, "batch_stats": statistics}


def rows_of_process(x, is_last):
    return np.split(x, 2)[is_last]


def global_array(value, mesh, spec):
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, spec), lambda part: value[part]
    )


def leaves(name, tree):
    return {f"{name} {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


if __name__ == "__main__":
    main(*sys.argv[1:])
