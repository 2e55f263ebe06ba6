"""Every transform of JAX agrees with plain evaluation or with finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import jaxbn

SHAPE = (6, 3)

# name: (offset of the input, mask)
CASES = {
    "near zero": (0.5, None),
    "far from zero": (50.0, None),
    "masked": (50.0, np.random.default_rng(1).random(SHAPE) < 0.8),
}


@pytest.fixture(params=CASES)
def case(request):
    """Return x, params, state, a cotangent, and `batch_norm` as a function of the first three."""
    offset, mask = CASES[request.param]
    rng = np.random.default_rng(0)
    x, scale, bias, mean, dy = (
        jnp.asarray(rng.normal(size=s)) for s in (SHAPE, (3,), (3,), (3,), SHAPE)
    )
    state = {"mean": mean, "var": mean**2 + 0.5, "count": jnp.int32(1)}

    def step(x, params, state, train=True):
        return jaxbn.batch_norm(params, state, x, train, mask=mask)

    return x + offset, {"scale": scale, "bias": bias}, state, dy, step


pytestmark = pytest.mark.usefixtures("x64")
assert_equal = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12))


@pytest.mark.parametrize("train", [True, False])
def test_jit(case, train):
    x, params, state, _, step = case
    assert_equal(
        jax.jit(step, static_argnums=3)(x, params, state, train), step(x, params, state, train)
    )


@pytest.mark.parametrize("train", [True, False])
def test_derivatives_of_both_orders_in_every_mode(case, train):
    """Forward mode, reverse mode, and each over each agree with finite differences."""
    x, params, state, dy, step = case

    def y(x, params):
        return step(x, params, state, train)[0] * dy

    # In float64 with a step of 1e-5, central differences of a function of order one, whose third
    # derivatives are too, are good to some 1e-8; where a second one is taken, to 1e-4.
    check_grads(y, (x, params), order=1, modes=("fwd", "rev"), eps=1e-5, rtol=1e-6, atol=1e-6)
    check_grads(y, (x, params), order=2, modes=("fwd", "rev"), eps=1e-5, rtol=1e-4, atol=1e-4)


def test_second_order_modes_agree(case):
    x, params, state, dy, step = case

    def loss(x):
        return jnp.sum(jnp.tanh(step(x, params, state)[0]) * dy)

    hessians = [
        jax.jacfwd(jax.grad(loss)),
        jax.jacrev(jax.grad(loss)),
        jax.jacfwd(jax.jacfwd(loss)),
    ]
    first, *others = [jax.jit(h)(x) for h in hessians]
    for other in others:
        assert_equal(other, first)
    square = first.reshape(x.size, x.size)
    np.testing.assert_allclose(square, square.T, atol=1e-12)


def test_linearize(case):
    x, params, state, dy, step = case

    def y(x):
        return step(x, params, state)[0]

    out, linear = jax.linearize(y, x)
    assert_equal((out, linear(dy)), jax.jvp(y, (x,), (dy,)))


@pytest.mark.parametrize("train", [True, False])
def test_vmap_over_x(case, train):
    x, params, state, _, step = case
    xs = jnp.stack([x, 2 * x + 1, x - 50])
    wanted = [step(x, params, state, train) for x in xs]
    got = jax.vmap(lambda x: step(x, params, state, train))(xs)
    assert_equal(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted))


def test_vmap_over_params_and_state(case):
    x, params, state, _, step = case
    many = [jax.tree.map(lambda leaf, k=k: leaf * k, (params, state)) for k in (1, 2, 3)]
    wanted = [step(x, *one) for one in many]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    got = jax.vmap(lambda one: step(x, *one))(stacked)
    assert_equal(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted))


def test_gradient_under_vmap(case):
    x, params, state, dy, step = case
    xs = jnp.stack([x, 2 * x + 1])

    def grad(x):
        return jax.grad(lambda x: jnp.sum(step(x, params, state)[0] * dy))(x)

    assert_equal(jax.vmap(grad)(xs), jnp.stack([grad(x) for x in xs]))


def test_scan(case):
    x, params, state, _, step = case
    xs = jnp.stack([x, 2 * x + 1, x - 50])
    wanted = state
    for one in xs:
        _, wanted = step(one, params, wanted)
    got, _ = jax.lax.scan(lambda s, x: step(x, params, s)[::-1], state, xs)
    assert_equal(got, wanted)


def test_cond(case):
    x, params, state, _, step = case
    for train in (True, False):
        got = jax.lax.cond(
            train,
            lambda x: step(x, params, state, True),
            lambda x: step(x, params, state, False),
            x,
        )
        assert_equal(got, step(x, params, state, train))


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_checkpoint(case, policy):
    x, params, state, dy, step = case

    def loss(x, params):
        return jnp.sum(step(x, params, state)[0] * dy)

    saved = jax.checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy))
    assert_equal(jax.grad(saved, (0, 1))(x, params), jax.grad(loss, (0, 1))(x, params))


@pytest.mark.parametrize("train", [True, False])
def test_eval_shape(case, train):
    x, params, state, _, step = case
    shapes = jax.eval_shape(partial(step, train=train), x, params, state)
    values = step(x, params, state, train)
    jax.tree.map(
        lambda s, v: np.testing.assert_equal((s.shape, s.dtype), (v.shape, v.dtype)), shapes, values
    )


@pytest.mark.parametrize("train", [True, False])
def test_export(case, train):
    x, params, state, _, step = case
    exported = export.export(jax.jit(partial(step, train=train)))(x, params, state)
    loaded = export.deserialize(bytearray(exported.serialize()))
    assert_equal(loaded.call(x, params, state), step(x, params, state, train))


def test_export_for_any_batch_size(case):
    _, params, state, _, _ = case
    (size,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 3), jnp.float64)
    for train in (True, False):
        step = jax.jit(lambda x, p, s, train=train: jaxbn.batch_norm(p, s, x, train))
        exported = export.export(step)(x, params, state)
        for rows in (2, 7):
            batch = 50 + jnp.arange(3.0 * rows).reshape(rows, 3)
            assert_equal(exported.call(batch, params, state), step(batch, params, state))


def test_no_recompilation_from_step_to_step(case):
    x, params, state, _, step = case
    jitted = jax.jit(lambda x, params, state: step(x, params, state))
    for k in range(4):
        _, state = jitted(x + k, params, state)
    assert jitted._cache_size() == 1


def test_buffers_can_be_donated(case):
    x, params, state, _, step = case
    wanted = step(x, params, state)
    y, new = jax.jit(step, donate_argnums=(0, 2))(x, params, state)
    assert_equal((y, new), wanted)
    assert x.is_deleted() and all(leaf.is_deleted() for leaf in state.values())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize(
    "mask", [None, np.array([[True], [True], [False], [True]])], ids=["", "masked"]
)
@pytest.mark.parametrize("train", [True, False])
def test_strict_promotion_of_dtypes_and_ranks(dtype, momentum, mask, train):
    x = jnp.arange(24).reshape(2, 4, 3).astype(dtype)
    params, state = jaxbn.init(x.shape, track_count=True)
    options = {"momentum": momentum, "mask": mask}
    if momentum is None:
        options["running_variance"] = "biased"

    def step(x, params, state):
        return jaxbn.batch_norm(params, state, x, train, **options)

    wanted = step(x, params, state)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got, vjp = jax.vjp(step, x, params, state)
        vjp(
            (
                got[0],
                jax.tree.map(np.zeros_like, got[1]) | {"count": np.zeros((), jax.dtypes.float0)},
            )
        )
    assert_equal(got, wanted)


def test_debug_nans_and_infs_find_nothing(case):
    x, params, state, dy, step = case
    with jax.debug_nans(True), jax.debug_infs(True):
        jax.grad(lambda x: jnp.sum(step(x, params, state)[0] * dy))(x)
        jax.grad(lambda x: jnp.sum(step(x, params, state)[0] * dy))(jnp.zeros_like(x))
