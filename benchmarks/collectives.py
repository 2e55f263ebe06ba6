"""Count the collectives of a compiled program, and their bytes.

`python -m benchmarks.collectives` prints those of one layer, as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks import hlo
from benchmarks.hlo import Collective
from benchmarks.settings import Settings

FEATURES = 64


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Return every collective of a compiled program, with the bytes of its result."""
    return hlo.collectives(compiled.as_text() or "")


def of_batch_norm(
    devices: int, features: int, dtype: str = "float32"
) -> tuple[list[Collective], list[Collective]]:
    """Return the collectives of one layer in `shard_map`: forward, and what backward adds."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    params, state = jaxbn.init((2, features))
    x = jnp.ones((2 * devices, features), dtype)

    def forward(params, x):
        return jaxbn.batch_norm(params, state, x, True, axis_name="data")

    def both(params, x):
        y, vjp, new = jax.vjp(forward, params, x, has_aux=True)
        return y, new, vjp(y)

    def compiled(function, out_specs):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=out_specs)
        return jax.jit(mapped).lower(params, x).compile()

    first = collectives(compiled(forward, (P("data"), P())))
    all_ = collectives(compiled(both, (P("data"), P(), (P(), P("data")))))
    for collective in first:
        all_.remove(collective)
    return first, all_


def count() -> dict[str, Any]:
    """Return the collectives of one layer on two devices, four, and so on, up to all devices."""
    cases = []
    devices = 2
    while devices <= jax.device_count():
        forward, backward = of_batch_norm(devices, FEATURES)
        cases.append({"devices": devices, "forward": forward, "backward": backward})
        devices *= 2
    return {"features": FEATURES, "backend": jax.default_backend(), "cases": cases}


def count_somewhere() -> dict[str, Any]:
    """Count on the devices here or, if there is only one, in a process with eight CPU devices."""
    if jax.device_count() > 1:
        return count()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.collectives"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(done.stdout)


def measure(settings: Settings) -> dict[str, Any]:
    (found,) = [count_somewhere() for _ in settings.track([None], "collectives")]
    return found


if __name__ == "__main__":
    print(json.dumps(count()))
