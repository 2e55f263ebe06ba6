"""One of several processes that take a training step together: see test_processes.py."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

DEVICES_EACH = 2


def main(coordinator: str, processes: str, process: str, problem: str, out: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=60)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with np.load(problem) as file:
        batch = {k: file[k] for k in ("x", "mask", "dy")}
        params = {k: file[k] for k in ("scale", "bias")}
        state = {k: file[k] for k in ("mean", "var")}

    # Each process holds its own rows alone, as a loader of data would give them.
    rows = len(batch["x"]) // int(processes)
    own = slice(int(process) * rows, (int(process) + 1) * rows)
    sharded = NamedSharding(mesh, P("data"))
    batch = {k: jax.make_array_from_process_local_data(sharded, v[own]) for k, v in batch.items()}

    def step(x, mask, dy, axis_name):
        def forward(x, params):
            return jaxbn.batch_norm(params, state, x, True, mask=mask, axis_name=axis_name)

        y, vjp, new = jax.vjp(forward, x, params, has_aux=True)
        dx, dparams = vjp(dy)
        return {"y": y, "dx": dx}, {**dparams, **new}

    mapped = jax.shard_map(
        lambda x, mask, dy: step(x, mask, dy, "data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=(P("data"), P()),
    )
    replicated = NamedSharding(mesh, P())
    results = {}
    for way, function in [
        ("shard_map", jax.jit(mapped)),
        (
            "jit",
            jax.jit(
                lambda x, mask, dy: step(x, mask, dy, None), out_shardings=(sharded, replicated)
            ),
        ),
    ]:
        per_row, whole = function(batch["x"], batch["mask"], batch["dy"])
        for k, v in per_row.items():
            shards = sorted(v.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            results[f"{way} {k}"] = np.concatenate([shard.data for shard in shards])
        for k, v in whole.items():
            results[f"{way} {k}"] = np.stack([shard.data for shard in v.addressable_shards])
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
