"""Run one of the processes of test_processes.py, which take a training step together."""

import itertools
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.devices import function, linen
from tests.devices import step as one_step
from tests.processes import PROCESSES, join


def main(coordinator: str, process: str, problem: str, out: str) -> None:
    jax.config.update("jax_enable_x64", True)
    mesh = join(coordinator, int(process))
    with np.load(problem) as file:
        batch = {k: file[k] for k in ("x", "mask", "dy")}
        params = {k: file[k] for k in ("scale", "bias")}
        state = {k: file[k] for k in ("mean", "var")}

    # Each process holds its own rows alone, as a loader of data would give them.
    rows = len(batch["x"]) // PROCESSES
    own = slice(int(process) * rows, (int(process) + 1) * rows)
    sharded = NamedSharding(mesh, P("data"))
    batch = {k: jax.make_array_from_process_local_data(sharded, v[own]) for k, v in batch.items()}

    def results_of(layer, axis_name):
        def step(x, mask, dy):
            y, dx, dparams, new = one_step(
                x, mask, dy, params, state, layer=layer, axis_name=axis_name
            )
            return {"y": y, "dx": dx}, {**dparams, **new}

        return step

    specs = {"in_specs": P("data"), "out_specs": (P("data"), P())}
    shardings = sharded, NamedSharding(mesh, P())
    results = {}
    for layer, way in itertools.product((function, linen), ("shard_map", "jit")):
        if way == "shard_map":
            mapped = jax.jit(jax.shard_map(results_of(layer, "data"), mesh=mesh, **specs))
        else:
            mapped = jax.jit(results_of(layer, None), out_shardings=shardings)
        way = f"{layer.__name__} {way}"
        per_row, whole = mapped(batch["x"], batch["mask"], batch["dy"])
        for k, v in per_row.items():
            shards = sorted(v.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            results[f"{way} {k}"] = np.concatenate([shard.data for shard in shards])
        for k, v in whole.items():
            results[f"{way} {k}"] = np.stack([shard.data for shard in v.addressable_shards])
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
