"""Ways to share one batch among devices, and batches for which that is hard."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen

DEVICES = 8
FEATURES = 6

# Sums of some hundred numbers of order one, in another order: 1e-9 leaves float64 six digits.
TOLERANCE = 1e-9


def function(x, params, state, **options):
    """Call the function itself; `linen` calls the module with the same arguments."""
    return jaxbn.batch_norm(params, state, x, True, **options)


def linen(x, params, state, mask=None, **options):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, **{**jaxbn.PYTORCH, **options})
    variables = {"params": params, "batch_stats": state}
    y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def step(x, mask, dy, params, state, layer=function, **options):
    """Return `y`, `dx`, the gradients of the parameters, and the new state."""

    def forward(x, params):
        return layer(x, params, state, mask=mask, **options)

    y, vjp, state = jax.vjp(forward, x, params, has_aux=True)
    return y, *vjp(dy), state


# Runs on one device, as the reference, or on sharded arrays.
compiled_step = jax.jit(step, static_argnames="layer")


def split(batch):
    return jax.tree.map(lambda v: v.reshape(DEVICES, -1, *v.shape[1:]), batch)


def join(batch):
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), batch)


@cache
def mapped(map_, layer):
    each = partial(step, layer=layer, axis_name="data")
    over = map_(each, axis_name="data", in_axes=(0, 0, 0, None, None))
    return over if map_ is jax.pmap else jax.jit(over)


def by_mapping(map_, batch, params, state, layer):
    """Use `vmap` or `pmap`: every device has its own results, those of the parameters too."""
    y, dx, dparams, states = mapped(map_, layer)(*split(batch), params, state)
    # The gradient of a device's own bias: the sum of its cotangents, masked-out ones included.
    own = split(batch)[2].sum((1, 2))
    np.testing.assert_allclose(dparams["bias"], own, rtol=1e-5, atol=1e-5)
    return *join((y, dx)), jax.tree.map(lambda v: v.sum(0), dparams), states


@cache
def shard_mapped(layer, axes, sizes, check):
    name = axes if len(axes) > 1 else axes[0]

    def each(batch, params, state):
        y, dx, dparams, new = step(*batch, params, state, layer, axis_name=name)
        if not check:
            dparams = jax.lax.psum(dparams, name)
        return y, dx, dparams, new, jax.tree.map(lambda v: v[None], new)

    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    return jax.jit(
        jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(P(axes), P(), P()),
            out_specs=(P(axes), P(axes), P(), P(), P(axes)),
            check_vma=check,
        )
    )


def by_shard_map(batch, params, state, layer, axes=("data",), sizes=(DEVICES,), check=True):
    """Use `shard_map`, which sums the parameters' gradients itself if it checks replication."""
    y, dx, dparams, _, states = shard_mapped(layer, axes, sizes, check)(batch, params, state)
    return y, dx, dparams, states


@cache
def vmapped_twice(layer):
    each = partial(step, layer=layer, axis_name=["outer", "inner"])
    in_axes = (0, 0, 0, None, None)
    inner = jax.vmap(each, axis_name="inner", in_axes=in_axes)
    return jax.jit(jax.vmap(inner, axis_name="outer", in_axes=in_axes))


def by_vmap_of_vmap(batch, params, state, layer):
    """Use two nested `vmap`s, and give the names of both axes in a list."""
    fold = partial(jax.tree.map, lambda v: v.reshape(2, DEVICES // 2, -1, *v.shape[1:]))
    results = vmapped_twice(layer)(*fold(batch), params, state)
    y, dx, dparams, states = jax.tree.map(lambda v: v.reshape(DEVICES, *v.shape[2:]), results)
    return *join((y, dx)), jax.tree.map(lambda v: v.sum(0), dparams), states


@cache
def vmapped_in_shard_map(layer):
    mesh = jax.make_mesh((DEVICES // 2,), ("outer",), axis_types=(jax.sharding.AxisType.Auto,))
    each = partial(step, layer=layer, axis_name=("outer", "inner"))
    inner = jax.vmap(each, axis_name="inner", in_axes=(0, 0, 0, None, None))
    return jax.jit(
        jax.shard_map(
            lambda batch, params, state: inner(*batch, params, state),
            mesh=mesh,
            in_specs=(P("outer"), P(), P()),
            out_specs=P("outer"),
            check_vma=False,
        )
    )


def by_vmap_in_shard_map(batch, params, state, layer):
    """Use four devices, of which each maps over two parts of the batch."""
    y, dx, dparams, states = vmapped_in_shard_map(layer)(split(batch), params, state)
    return *join((y, dx)), jax.tree.map(lambda v: v.sum(0), dparams), states


def by_jit(batch, params, state, layer, features=False, axis_type=jax.sharding.AxisType.Auto):
    """Use `jit` with sharded arrays: no axis name, and nothing to sum by hand."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    feature = "model" if features else None
    sharded = NamedSharding(mesh, P("data" if features else ("data", "model"), None, feature))
    whole = NamedSharding(mesh, P(feature))
    x, mask, dy = (v if v is None else jax.device_put(v, sharded) for v in batch)
    params, state = jax.tree.map(lambda v: jax.device_put(v, whole), (params, state))
    assert len(x.sharding.device_set) == DEVICES
    with jax.set_mesh(mesh):
        y, dx, dparams, new = compiled_step(x, mask, dy, params, state, layer=layer)
    return y, dx, dparams, jax.tree.map(copies, new)


def copies(array):
    """Return each device's own copy of an array, stacked over devices."""
    shards = {}
    for shard in array.addressable_shards:
        start = shard.index[0].start or 0
        shards.setdefault(start, []).append(np.asarray(shard.data))
    rows = zip(*(shards[start] for start in sorted(shards)), strict=True)
    # Where features are sharded, fewer devices hold a copy of each.
    whole = [np.concatenate(row) for row in rows]
    return np.stack(whole * (DEVICES // len(whole)))


WAYS = {
    "vmap": partial(by_mapping, jax.vmap),
    "pmap": partial(by_mapping, jax.pmap),
    "shard_map": by_shard_map,
    "shard_map, unchecked": partial(by_shard_map, check=False),
    "shard_map over two axes": partial(by_shard_map, axes=("data", "model"), sizes=(4, 2)),
    "shard_map over two axes, unchecked": partial(
        by_shard_map, axes=("data", "model"), sizes=(4, 2), check=False
    ),
    "vmap over two axes": by_vmap_of_vmap,
    "vmap in shard_map": by_vmap_in_shard_map,
    "jit, batch sharded": by_jit,
    "jit, batch and features sharded": partial(by_jit, features=True),
    "jit, batch sharded, explicit": partial(by_jit, axis_type=jax.sharding.AxisType.Explicit),
    "jit, batch and features sharded, explicit": partial(
        by_jit, features=True, axis_type=jax.sharding.AxisType.Explicit
    ),
}


def no_mask(rng, shape):
    return None


def unequal(rng, shape):
    """Count a share of the values that differs between devices."""
    share = np.repeat(np.linspace(0.1, 0.9, DEVICES), shape[0] // DEVICES)
    return rng.random(shape) < share[:, None, None]


def a_device_without(rng, shape):
    """Count nothing on the third device, and everything elsewhere."""
    mask = np.ones(shape, bool)
    mask[2 * shape[0] // DEVICES : 3 * shape[0] // DEVICES] = False
    return mask


def nothing(rng, shape):
    return np.zeros(shape, bool)


# name: (the whole batch's shape, its mask)
BATCHES = {
    "equal": ((16, 5, FEATURES), no_mask),
    "one value per device": ((DEVICES, 1, FEATURES), no_mask),
    "unequal": ((16, 5, FEATURES), unequal),
    "a device without values": ((16, 5, FEATURES), a_device_without),
    "no value at all": ((16, 5, FEATURES), nothing),
}


def problem(name):
    rng = np.random.default_rng(0)
    shape, mask = BATCHES[name]
    x, dy = 3 + 2 * rng.normal(size=shape), rng.normal(size=shape)
    # Devices' means differ by more than the deviation within one.
    x += np.repeat(5 * rng.normal(size=(DEVICES, 1, 1)), shape[0] // DEVICES, 0)
    mask = mask(rng, shape)
    if mask is not None:
        x, mask = np.where(mask, x, np.nan), jnp.asarray(mask)
    names = ("scale", "bias"), ("mean", "var")
    params, state = ({k: jnp.asarray(rng.normal(size=FEATURES)) for k in key} for key in names)
    return (jnp.asarray(x), mask, jnp.asarray(dy)), params, state
