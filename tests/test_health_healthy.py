"""`check` finds nothing in networks that train correctly, unless their statistics lag."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.health import check
from tests.health import LAYERS, NETWORKS, codes, shuffled

BATCHES = jnp.stack(shuffled())
LEARNING_RATE = 0.01
MOMENTA = [0.0, 0.5, 0.9, 0.99, 0.999]


def loss_of(y, x):
    """Return the loss of a regression of products of the inputs."""
    return jnp.mean((y - x[:, :3] * x[:, 1:] / 4) ** 2)


def descend(params, gradients):
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)


def trained_linen(momentum, steps):
    network = NETWORKS["linen"](momentum=momentum)

    @jax.jit
    def train(variables):
        def step(variables, i):
            x = BATCHES[i % len(BATCHES)]

            def loss(params):
                y, updates = network.model.apply(
                    {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
                )
                return loss_of(y, x), updates

            gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
            return {"params": descend(variables["params"], gradients), **updates}, None

        return jax.lax.scan(step, variables, jnp.arange(steps))[0]

    network.variables = train(network.variables)
    return network


def trained_nnx(momentum, steps):
    network = NETWORKS["nnx"](momentum=momentum)
    graphdef, params, rest = nnx.split(network.model, nnx.Param, ...)

    @jax.jit
    def train(params, rest):
        def step(state, i):
            params, rest = state
            x = BATCHES[i % len(BATCHES)]

            def loss(params):
                model = nnx.merge(graphdef, params, rest, copy=True)
                return loss_of(model(x), x), nnx.split(model, nnx.Param, ...)[2]

            gradients, rest = jax.grad(loss, has_aux=True)(params)
            return (descend(params, gradients), rest), None

        return jax.lax.scan(step, (params, rest), jnp.arange(steps))[0]

    nnx.update(network.model, *train(params, rest))
    return network


TRAINED = {"linen": trained_linen, "nnx": trained_nnx}


def memory(momentum):
    """Return the number of steps after which a share of 1/e of the initial values remains."""
    return 1 if momentum == 0 else -1 / np.log(momentum)


@pytest.mark.parametrize("network", TRAINED)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("length", ["short", "long"])
def test_silence(network, momentum, length):
    """The initial values have a weight of exp(-4), 2 %, after short training, and 0 after long.

    Batches of 64 values are 0.15 deviations from the data at momentum 0.
    """
    steps = round(memory(momentum) * {"short": 4, "long": 20}[length])
    report = TRAINED[network](momentum, max(steps, 10)).check(shuffled())
    assert report.findings == ()
    assert len(report.layers) == 3 and report.ok


@pytest.mark.parametrize("network", TRAINED)
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_lag(network, momentum):
    """After a tenth of the memory, the initial values still have a weight of 90 %."""
    steps = round(memory(momentum) / 10)
    report = TRAINED[network](momentum, steps).check(shuffled())
    assert codes(report)[0] == (LAYERS[0], "off")
    assert {code for _, code in codes(report)} == {"off"}
    (text,) = {
        finding.text.partition("They lag: ")[2]
        for finding in report.findings
        if finding.path == LAYERS[0]
    }
    assert text.startswith("the initial values, mean 0 and variance 1, still have ")
    weight = float(text.split("still have ")[1].split(" %")[0])
    assert weight == pytest.approx(100 * momentum**steps, rel=0.02)


def test_the_same_network_before_training():
    report = NETWORKS["linen"]().check(shuffled())
    assert codes(report) == [(layer, "never-updated") for layer in LAYERS]


@pytest.mark.parametrize("n", [32, 1000])
def test_standardized_data_needs_no_updates(n):
    """Data with mean 0 and variance 1 is not evidence of lost updates."""
    x = np.random.default_rng(0).standard_t(5, size=(n, 8)).astype("float32") / np.sqrt(5 / 3)
    model = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    assert check(model, None, [x]).ok
    assert codes(check(model, None, [2 * x])) == [("", "never-updated")]
