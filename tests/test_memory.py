"""The layer keeps little for its backward pass, and lets users recompute the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxbn
from benchmarks import memory
from tests import forms

pytestmark = pytest.mark.usefixtures("without_compilation_cache")

SHAPE = (64, 8, 16)


def kept(function, *arguments):
    """Return the arrays of a batch's size that `function` keeps for its backward pass."""
    _, vjp = jax.vjp(jax.jit(function), *arguments)
    return [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= np.prod(SHAPE)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("train", [True, False])
def test_one_copy_of_the_input_in_the_type_it_came_in(dtype, train):
    params, state = jaxbn.init(SHAPE)
    x = jnp.ones(SHAPE, dtype)
    (leaf,) = kept(lambda x, p: jaxbn.batch_norm(p, state, x, train)[0], x, params)
    assert leaf.dtype == x.dtype and leaf.shape == SHAPE


def test_under_a_mask_the_mask_too():
    params, state = jaxbn.init(SHAPE)
    x, mask = jnp.ones(SHAPE, jnp.bfloat16), jnp.ones(SHAPE, bool)
    leaves = kept(lambda x, m, p: jaxbn.batch_norm(p, state, x, True, mask=m)[0], x, mask, params)
    assert {leaf.dtype for leaf in leaves} <= {x.dtype, mask.dtype}
    assert len(leaves) == 2


def block(params, state, x, kernel):
    """Apply dense → batch norm → relu, with a checkpoint name for the matrix product only."""
    x = checkpoint_name(x @ kernel, "product")
    return jax.nn.relu(jaxbn.batch_norm(params, state, x, True)[0])


def test_the_moments_can_be_kept_by_name_and_the_rest_recomputed():
    params, state = jaxbn.init(SHAPE)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    kernel = jax.random.normal(jax.random.key(1), (16, 16))
    policy = jax.checkpoint_policies.save_only_these_names("product", "batch_norm_moments")

    def two_blocks(wrap):
        def loss(x, kernel):
            one = wrap(lambda x, k: block(params, state, x, k))
            return jnp.sum(one(one(x, kernel), kernel) ** 2)

        return loss

    plain = two_blocks(lambda f: f)
    cheap = two_blocks(lambda f: jax.checkpoint(f, policy=policy))
    jax.tree.map(
        # The same arithmetic, which the compiler may fuse otherwise: roundings of float32.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
        jax.grad(cheap, (0, 1))(x, kernel),
        jax.grad(plain, (0, 1))(x, kernel),
    )
    # The input and product of each block, and not what lies between a product and its relu.
    assert len(kept(cheap, x, kernel)) < len(kept(plain, x, kernel))


# Found in a program once for each time that it computes the moments.
ONCE = {"cpu": "while[", "cuda": "= slice[", "tpu": "= slice["}


@pytest.mark.parametrize("form", ONCE)
def test_the_moments_are_found_once_where_they_are_kept(form):
    params, state = jaxbn.init(SHAPE)
    x, kernel = jnp.ones(SHAPE), jnp.ones((16, 16))

    def times(policy):
        one = jax.checkpoint(lambda x: block(params, state, x, kernel), policy=policy)
        # As traced: what is equal the compiler may find by itself, at the price of keeping it.
        with forms.of(form):
            program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(one(x) ** 2)))(x))
        return program.count(ONCE[form])

    policies = jax.checkpoint_policies
    assert times(policies.save_only_these_names("product", "batch_norm_moments")) == 1
    assert times(policies.save_only_these_names("product")) == 2


# Flax's convolutions and layers promote dtypes.
@pytest.mark.usefixtures("standard_promotion")
def test_a_network_in_bfloat16_keeps_no_wider_copies_on_a_cpu():
    """XLA for CPUs convolves in float32, and would keep that where the rounded result is enough.

    Flax's layer widens each input for its own part. Ours needs 0.59 of its temporaries, and would
    need 0.86 if those copies were kept.
    """
    model = {"stem": "small", "blocks": (2, 2), "features": 32}
    ours, flax = (
        memory.step_temporaries(name, "bfloat16", (32, 32, 32, 3), **model)
        for name in ("ours", "Flax")
    )
    assert ours is not None and flax is not None
    assert ours < 0.7 * flax
