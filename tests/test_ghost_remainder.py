"""The last ghost batch is smaller if the group size does not divide the number of examples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

import jaxbn
from jaxbn.parity._hard_inputs import INPUTS
from tests import close, forms, ghosts, oracle
from tests.accuracy import BIAS, DY, SCALE, assert_accurate
from tests.ghosts import OPTIONS, SIZE, C, batch, params_and_state
from tests.raises import raises

# Sums of some dozen numbers of order one, forward and backward: eps = 2e-16 leaves five orders.
assert_close = partial(close.assert_close, tolerance=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("examples", "masked"), [(2 * SIZE + 1, False), (3 * SIZE - 1, True)])
def test_the_last_group_is_a_batch_of_its_own(rng, examples, masked, options):
    params, state = params_and_state(rng)
    x, dy = batch(rng, examples), batch(rng, examples)
    mask = jnp.asarray(rng.random((examples, 5, 1)) < 0.7) if masked else None

    def both_ways(step):
        y, vjp, new = jax.vjp(step, params, x, has_aux=True)
        return y, new, vjp(dy)

    def grouped(params, x):
        return jaxbn.batch_norm(
            params, state, x, True, mask=mask, virtual_batch_size=SIZE, **options
        )

    def wanted(params, x):
        return ghosts.one_by_one(params, state, x, mask, **options)

    found = jax.jit(both_ways, static_argnums=0)(grouped)
    assert_close(found, jax.jit(both_ways, static_argnums=0)(wanted))
    whole, _ = jaxbn.batch_norm(params, state, x, True, mask=mask, **options)
    assert np.abs(whole - found[0])[-1].max() > 1e-2


def test_all_groups_have_the_same_weight(rng):
    """Each group moves the state as much as any other, whatever its size."""
    state = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    x = jnp.asarray(np.repeat([1.0, 4.0], [SIZE, 2])[:, None] * np.ones(C), jnp.float32)
    options = {"momentum": 0.5, "virtual_batch_size": SIZE}
    _, new = jaxbn.batch_norm({}, state, x, True, **options)
    wanted = {"mean": jnp.full(C, 0.5 * (1 + 4) / 2), "var": jnp.full(C, 0.5)}
    close.assert_equal(new, wanted)  # these numbers need no rounding


@pytest.mark.usefixtures("x64")
def test_groups_without_values_are_left_out_of_the_mean(rng):
    params, state = params_and_state(rng)
    x = batch(rng, 2 * SIZE + 1)
    last = jnp.arange(len(x))[:, None, None] == 2 * SIZE
    step = partial(jaxbn.batch_norm, params, state, train=True, virtual_batch_size=SIZE)
    y, new = step(jnp.where(last, jnp.nan, x), mask=~last)
    assert_close((y[:-1], new), step(x[:-1]))
    close.assert_equal(y[-1], jnp.broadcast_to(params["bias"], y[-1].shape))
    y, new = step(jnp.where(last, x, jnp.nan), mask=last)
    assert_close((y[-1:], new), step(x[-1:]))


@pytest.mark.parametrize("size", [SIZE + 1, 1000])
def test_a_size_beyond_the_batch_is_one_group(rng, size):
    params, state = jaxbn.init((SIZE, 5, C))
    x = batch(rng, SIZE).astype(jnp.float32)
    step = partial(jaxbn.batch_norm, params, state, x, True)
    close.assert_equal(step(virtual_batch_size=size), step(virtual_batch_size=SIZE))


def test_a_last_group_of_one_value():
    params, state = jaxbn.init((SIZE + 1, C))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(SIZE + 1, C)), jnp.float32)
    with raises(ValueError, "x of shape (5, 3) has one value per feature (axis 1) in the last "
                "group of virtual_batch_size=4, which has no unbiased variance; give more values, "
                "or batch_variance='biased' and running_variance='biased'."):  # fmt: skip
        jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)
    params = {**params, "bias": jnp.arange(3.0)}

    def last(x):
        y, new = jaxbn.batch_norm(
            params, state, x, True, running_variance="biased", virtual_batch_size=SIZE
        )
        return y[-1], new

    y, vjp, new = jax.vjp(last, x, has_aux=True)
    close.assert_equal(y, params["bias"])
    close.assert_equal(vjp(jnp.ones(C)), (jnp.zeros_like(x),))
    # The value has no variance, which counts as much as that of the others.
    full = jaxbn.batch_norm(params, state, x[:SIZE], True, running_variance="biased")[1]
    wanted = 0.9 * state["var"] + (full["var"] - 0.9 * state["var"]) / 2
    close.assert_close(new["var"], wanted, 1e-6)  # a few roundings of float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1, (0, 2), (1, 2)])
def test_features_on_any_axes(rng, axis):
    """Examples are on the first axis that is not the features', be it the first of all or not."""
    x = jnp.asarray(rng.normal(size=(6, 7, 2, 5)))
    _, state = jaxbn.init(x.shape, axis)
    step = partial(jaxbn.batch_norm, {}, state, train=True, axis=axis)
    y, new = step(x, virtual_batch_size=SIZE)
    axes = (axis,) if isinstance(axis, int) else axis
    examples = min({0, 1} - set(axes))
    cuts = jnp.split(x, [SIZE], examples)
    ys, states = zip(*map(step, cuts), strict=True)
    assert len(cuts) == 2
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *states)
    assert_close((y, new), (jnp.concatenate(ys, examples), mean))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_higher_derivatives(rng, masked):
    params, _ = params_and_state(rng)
    x = jnp.asarray(rng.normal(size=(5, C)))
    mask = jnp.asarray([[True], [False], [True], [True], [True]]) if masked else None

    def y(params, x):
        options = {"mask": mask, "virtual_batch_size": 3, "epsilon": 1e-2}
        return jaxbn.batch_norm(params, None, x, True, running_variance="biased", **options)[0]

    # Central differences, whose error is of the order of the squared step.
    check_grads(jax.jit(y), (params, x), order=2, atol=1e-5, rtol=1e-5, eps=1e-4)


def test_vmap_of_gradients_in_half_precision(rng):
    params, state = jaxbn.init((6, 5, C))
    x = batch(rng, 6).astype(jnp.bfloat16)

    def loss(x, step):
        return jnp.sum(jnp.sin(step(x).astype(jnp.float32)))

    def grouped(x):
        return jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)[0]

    def alone(x):
        return ghosts.one_by_one(params, {**state, "count": jnp.int32(0)}, x)[0]

    many = jnp.stack([x, 2 * x])
    found = jax.jit(jax.vmap(jax.grad(partial(loss, step=grouped))))(many)
    assert found.dtype == jnp.bfloat16
    wanted = jnp.stack([jax.grad(partial(loss, step=alone))(part) for part in many])
    # Roundings of bfloat16 gradients, of which the largest is a few.
    close.assert_close(found, wanted, 2e-2, of_largest=True)


def test_evaluation_has_no_groups(rng):
    params, state = jaxbn.init((6, 5, C))
    x = batch(rng, 6)
    evaluate = partial(jaxbn.batch_norm, params, state, x, False)
    close.assert_equal(evaluate(virtual_batch_size=SIZE), evaluate())


@pytest.mark.parametrize("name", ["N(0, 1)", "N(1e4, 1)", "a deviation per feature"])
@pytest.mark.parametrize("form", forms.FORMS)
def test_hard_inputs(form, name):
    """The last group is as accurate as a batch of its own."""
    x = INPUTS[name].astype(np.float32)
    size, last = 1024 + 512, slice(3072, 4096)

    def step(x, dy):
        def forward(x, scale, bias):
            return jaxbn.batch_norm(
                {"scale": scale, "bias": bias}, None, x, True, virtual_batch_size=size
            )[0]

        y, vjp = jax.vjp(forward, x, jnp.asarray(SCALE), jnp.asarray(BIAS))
        return y, *vjp(jnp.zeros_like(dy).at[last].set(dy[last]))

    y, dx, dscale, dbias = forms.jit(step, form)(x, DY)
    truth = oracle.batch_norm(x[last], DY[last], SCALE, BIAS)
    # Statistics are not returned without a state; those of the truth stand in for them.
    ours = oracle.Result(y[last], dx[last], dscale, dbias, truth.mean, truth.var)
    assert_accurate(ours, truth, form)
    assert not dx[: last.start].any()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("examples", "size"), [(100, 32), (33, 32), (10, 4), (7, 100)])
def test_the_groups_of_tabnet(rng, examples, size):
    """The chunks of PyTorch's TabNet are of one size, or the last of them is smaller."""
    x, dy = rng.normal(size=(2, examples, C))
    chunks = -(-examples // size)

    def ours(x):
        options = {"virtual_batch_size": -(-examples // chunks)}
        return jaxbn.batch_norm({}, None, x, True, **options)[0]

    theirs = torch.tensor(x, requires_grad=True)
    norm = torch.nn.BatchNorm1d(C, dtype=torch.float64)
    wanted = torch.cat([norm(chunk) for chunk in theirs.chunk(chunks)])
    (gradient,) = torch.autograd.grad(wanted, theirs, torch.tensor(dy))
    y, vjp = jax.vjp(ours, jnp.asarray(x))
    assert_close([y, *vjp(jnp.asarray(dy))], [wanted.detach().numpy(), gradient.numpy()])
