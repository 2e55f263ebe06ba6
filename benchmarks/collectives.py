"""Collectives of a compiled program: how many, and how many bytes."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    bytes: int


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Every collective in the text of a compiled program, with the bytes of its result."""
    found = []
    for result, kind in _COLLECTIVE.findall(compiled.as_text() or ""):
        sizes = (
            int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n)
            for _, bits, dims in _SHAPE.findall(result)
        )
        found.append(Collective(kind, sum(sizes)))
    return found


def of_batch_norm(devices: int, features: int) -> tuple[list[Collective], list[Collective]]:
    """Those of one layer's forward pass, and those that its backward pass adds, in `shard_map`."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    params, state = jaxbn.init((2, features))
    x = jnp.ones((2 * devices, features))

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
