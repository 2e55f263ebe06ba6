"""In a Linen model that changes one import, lifted transforms do what they do with Flax."""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.linen.summary
import jax
import jax.numpy as jnp
import pytest

import jaxbn.linen
from tests.drop_in import KEY, X, assert_close

ours, theirs = jaxbn.linen.BatchNorm, nn.BatchNorm


class Twice(nn.Module):
    """Call one layer twice, over an axis that does not exist in initialization."""

    norm: Any

    @nn.compact
    def __call__(self, x):
        norm = self.norm(name="norm", use_running_average=False, axis_name="batch")
        return norm(x), norm(norm(x) ** 2)


def test_called_twice_and_initialized_without_its_axis():
    got, wanted = (Twice(norm).init_with_output(KEY, X) for norm in (ours, theirs))
    assert_close(got, wanted)

    def step(norm):
        apply = partial(Twice(norm).apply, wanted[1], mutable=["batch_stats"])
        return jax.vmap(apply, axis_name="batch")(X.reshape(2, 4, 6))

    assert_close(step(ours), step(theirs))


@pytest.mark.parametrize("groups", [None, [[0, 2], [1, 3]]], ids=["all", "groups"])
def test_pmap(groups):
    x = X.reshape(4, 2, 6)

    def step(norm):
        layer = norm(axis_name="batch", axis_index_groups=groups, use_running_average=False)
        variables = layer.init(KEY, x[0])
        apply = partial(layer.apply, variables, mutable=["batch_stats"])
        return jax.pmap(apply, axis_name="batch")(x)

    assert_close(jax.device_get(step(ours)), jax.device_get(step(theirs)))


class Block(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x):
        return nn.tanh(self.norm(use_running_average=False)(nn.Dense(x.shape[-1])(x)))


class BlockWithCarry(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(self.norm(use_running_average=False)(nn.Dense(x.shape[-1])(x))), None


EACH = {"params": 0, "batch_stats": 0}
LIFTED = {
    "jit": lambda norm: nn.jit(Block)(norm),
    "remat": lambda norm: nn.remat(Block)(norm),
    "vmap": lambda norm: nn.vmap(Block, variable_axes=EACH, split_rngs={"params": True})(norm),
    "vmap, shared": lambda norm: nn.vmap(
        Block,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="batch",
    )(partial(norm, axis_name="batch")),
    "scan": lambda norm: nn.scan(
        BlockWithCarry, variable_axes=EACH, split_rngs={"params": True}, length=3
    )(norm),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_lifted_transforms(lift):
    x = X.reshape(2, 4, 6)
    arguments = (x, None) if lift == "scan" else (x,)
    # Flax's variables for both.
    variables = LIFTED[lift](theirs).init(KEY, *arguments)

    def results(norm):
        def loss(params, x):
            out, updates = LIFTED[lift](norm).apply(
                {**variables, "params": params}, x, *arguments[1:], mutable=["batch_stats"]
            )
            return sum(jnp.sum(y**3) for y in jax.tree.leaves(out)), updates

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    # A loss, and gradients that are sums of 48 terms of up to ten, through up to three layers.
    assert_close(results(ours), results(theirs), 2e-4)


def test_bound_modules():
    class Net(nn.Module):
        norm: Any

        def setup(self):
            self.first, self.bn = nn.Dense(3), self.norm()

    def forward(net, x):
        return net.bn(net.first(x), use_running_average=False)

    def run(norm):
        net = Net(norm)
        y, variables = nn.init_with_output(forward, net)(KEY, X)
        bound = net.bind(variables, mutable=["batch_stats"])
        return y, forward(bound, X), bound.variables["batch_stats"]

    assert_close(run(ours), run(theirs))


def test_tabulate():
    wide = {"width": 200}
    tables = [
        flax.linen.summary.tabulate(Block(norm), KEY, console_kwargs=wide)(X)
        for norm in (ours, theirs)
    ]
    assert "BatchNorm_0" in tables[0] and tables[0] == tables[1]
