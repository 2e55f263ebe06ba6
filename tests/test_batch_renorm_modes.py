"""Without correction, `batch_renorm` is batch norm; unclipped, it is evaluation. In every mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.close import assert_close, assert_equal

SHAPE, PARTS = (16, 3, 5), 4
MASK = (np.arange(16) % 3 > 0)[:, None, None]


def renorm(r_max, d_max):
    return partial(jaxbn.batch_renorm, r_max=r_max, d_max=d_max)


def evaluation(params, state, x, train, *, virtual_batch_size=None, **options):
    """Return the output of evaluation with the state before the step, and the state after it."""
    y, _ = jaxbn.batch_norm(params, state, x, False, **options)
    groups = {"virtual_batch_size": virtual_batch_size}
    return y, jaxbn.batch_norm(params, state, x, train, **options, **groups)[1]


def given(dtype):
    """Return parameters, statistics near those of the batch, and the batch. It alone is rounded."""
    rng = np.random.default_rng(0)
    wide = "float64" if dtype == "float64" else "float32"
    params = {k: jnp.asarray(rng.normal(1, 0.5, SHAPE[-1]), wide) for k in ("scale", "bias")}
    state = {
        "mean": jnp.asarray(rng.normal(3, 2, SHAPE[-1]), wide),
        "var": jnp.asarray(rng.uniform(0.5, 9, SHAPE[-1]), wide),
    }
    return params, state, jnp.asarray(rng.normal(3, 2, SHAPE), dtype)


def with_options(**options):
    return lambda function, params, state, x: function(params, state, x, True, **options)


def of_two_axes(**options):
    def run(function, params, state, x):
        params, state = jax.tree.map(lambda v: jnp.tile(v, (3, 1)), (params, state))
        return function(params, state, x, True, axis=(1, 2), **options)

    return run


def counting(function, params, state, x):
    state = state | {"count": jnp.zeros((), jnp.int32)}
    return function(params, state, x, True, momentum=None)


def in_parts(x):
    return x.reshape(PARTS, -1, *x.shape[1:])


def over_devices(function, params, state, x):
    train = partial(function, params, state, train=True, axis_name="data")
    return jax.vmap(lambda x: train(x), axis_name="data")(in_parts(x))


def sharded(**options):
    def run(function, params, state, x):
        def each(params, state, x):
            return function(params, state, x, True, axis_name="data", **options)

        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((PARTS,), ("data",), axis_types=auto, devices=jax.devices()[:PARTS])
        specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P("data"), P())}
        return jax.shard_map(each, mesh=mesh, **specs)(params, state, x)

    return run


def over_states(function, params, state, x):
    states = jax.tree.map(lambda v: jnp.stack([v, v + 1]), state)
    return jax.vmap(lambda state: function(params, state, x, True))(states)


def scanned(function, params, state, x):
    @jax.checkpoint
    def step(state, x):
        return function(params, state, x, True)[::-1]

    new, y = jax.lax.scan(step, state, in_parts(x))
    return y, new


MODES = {
    "plain": with_options(),
    "masked": with_options(mask=MASK),
    "ghost batches": with_options(virtual_batch_size=4),
    "ghost batches, masked": with_options(virtual_batch_size=8, mask=MASK),
    "a smaller last ghost batch": with_options(virtual_batch_size=5),
    "unbiased": with_options(batch_variance="unbiased"),
    "Keras": with_options(**jaxbn.KERAS),
    "two feature axes": of_two_axes(),
    "one value per feature": of_two_axes(virtual_batch_size=1, running_variance="biased"),
    "cumulative average": counting,
    "vmap over devices": over_devices,
    "vmap over states": over_states,
    "scan and checkpoint": scanned,
}
SHARDED = {
    "shard_map": sharded(),
    "shard_map, ghost batches": sharded(virtual_batch_size=3),
}


def in_all_modes(run, function, dtype):
    """Run the modes on one device as one program, since compiling many is slow.

    Those on several devices have a program each. If one has several `shard_map`s, XLA may run their
    collectives in another order on each CPU device, and with few cores they wait for one another.
    """

    def in_one_program(modes):
        return jax.jit(lambda given: {k: run(mode, function, *given) for k, mode in modes.items()})(
            given(dtype)
        )

    results = in_one_program(MODES)
    for name, mode in SHARDED.items():
        results |= in_one_program({name: mode})
    return results


def forward(mode, function, params, state, x):
    return mode(function, params, state, x)


def forward_and_backward(mode, function, params, state, x):
    y, vjp, new = jax.vjp(lambda p, x: mode(function, p, state, x), params, x, has_aux=True)
    return y, vjp(jnp.sin(y)), new


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_correction_it_is_batch_norm_bit_for_bit(dtype):
    got, wanted = (
        in_all_modes(forward_and_backward, function, dtype)
        for function in (renorm(1, 0), jaxbn.batch_norm)
    )
    for name in got:
        assert_equal(got[name], wanted[name])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_unclipped_training_is_evaluation_with_the_state_before(dtype):
    with jax.enable_x64(dtype == "float64"):
        got, wanted = (
            in_all_modes(forward, function, dtype)
            for function in (renorm(np.inf, np.inf), evaluation)
        )
    # Both round their output once, from float32; or float64 rounds at 1e-16, and some hundred
    # values of at most ten are summed.
    tolerance = 1e-12 if dtype == "float64" else float(jnp.finfo(dtype).eps)
    for name in got:
        assert_close(got[name], wanted[name], tolerance)


def test_clipped_training_is_not_evaluation():
    """Otherwise the limits of the test above would not matter."""
    clipped, unclipped = (
        in_all_modes(forward, renorm(*limits), "float32") for limits in ((1.05, 0.05), (9, 9))
    )
    for name in clipped:
        assert not np.allclose(clipped[name][0], unclipped[name][0], atol=0.01), name


def test_means_far_from_zero():
    """The batch mean lies between the numbers of float32, which are 1/16 apart at a million."""
    rng = np.random.default_rng(0)
    centers = np.array([1e3, 1e4, 1e5, 1e6])
    x = rng.normal(centers, 1, (256, 4)).astype("float32")
    state = {"mean": (centers + 0.3).astype("float32"), "var": np.full(4, 1.2, "float32")}
    mask = (np.arange(256) % 3 > 0)[:, None]

    @jax.jit
    def outputs(x):
        train = partial(renorm(np.inf, np.inf), {}, state, x, True)
        return train()[0], train(mask=mask)[0]

    wanted = (x.astype("float64") - state["mean"]) / np.sqrt(state["var"] + 1e-5, dtype="float64")
    # Two terms, of at most the largest output, are rounded some five times each.
    bound = 10 * 2**-24 * np.abs(wanted).max()
    for got, expected in zip(outputs(x), (wanted, wanted * mask), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
