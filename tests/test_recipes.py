"""The identities of docs/recipes.md, in float64."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
import jaxbn.linen
from jaxbn.calibrate import merge
from tests.close import assert_close, assert_equal

pytestmark = pytest.mark.usefixtures("x64")

# Float64 rounds at 1e-16, and sums of some hundred values of order one have another order.
TOLERANCE = 1e-12
K, N, FEATURES = 4, 16, 5


def problem():
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(1, 0.5, FEATURES)) for k in ("scale", "bias")}
    state = {
        "mean": jnp.asarray(rng.normal(size=FEATURES)),
        "var": jnp.asarray(rng.uniform(1, 2, FEATURES)),
    }
    # Micro-batches have different means, so that normalizing them together would differ.
    x = jnp.asarray(rng.normal(2, 3, (K, N, FEATURES)) + 5 * np.arange(K)[:, None, None])
    return params, state, x


def recipes():
    """Return the functions that the page defines, whose example is in float32."""
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    names: dict = {}
    with jax.enable_x64(False):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]:
            exec(compile(block, "recipes.md", "exec"), names)
    return names


def loss(params, state, x, **options):
    y, new = jaxbn.batch_norm(params, state, x, True, **options)
    return jnp.mean(jnp.sin(y)), (y, new)


gradient = jax.grad(loss, has_aux=True)


class TestAccumulatedGradients:
    def test_micro_batches_equal_one_batch_with_ghost_batches(self):
        params, state, x = problem()
        got, new = recipes()["accumulate"](params, state, x)
        whole = x.reshape(K * N, FEATURES)
        wanted, (y, wanted_new) = gradient(params, state, whole, virtual_batch_size=N)
        assert_close((got, new), (wanted, wanted_new), TOLERANCE)
        outputs = jnp.stack([gradient(params, state, part)[1][0] for part in x])
        assert_close(outputs.reshape(y.shape), y, TOLERANCE)

    @pytest.mark.usefixtures("standard_promotion")
    def test_with_optax(self):
        """`MultiSteps` averages the gradients, and the state waits for the last micro-batch."""
        params, state, x = problem()
        tx = optax.MultiSteps(optax.sgd(0.1), K, accumulator_dtype=jnp.float64)
        optimizer, trained, states = tx.init(params), params, []
        for part in x:
            gradients, (_, new) = gradient(trained, state, part)
            updates, optimizer = tx.update(gradients, optimizer, trained)
            trained = optax.apply_updates(trained, updates)
            states.append(new)
        new_state = jax.tree.map(lambda *leaves: sum(leaves) / K, *states)

        whole = x.reshape(K * N, FEATURES)
        gradients, (_, wanted_state) = gradient(params, state, whole, virtual_batch_size=N)
        wanted = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        assert_close((trained, new_state), (wanted, wanted_state), TOLERANCE)

    def test_updating_in_between_takes_the_momentum_to_the_power_of_k(self):
        """Exactly so for micro-batches with the same statistics."""
        params, state, x = problem()
        moved = state
        for _ in range(K):
            moved = jaxbn.batch_norm(params, moved, x[0], True, momentum=0.9)[1]
        wanted = jaxbn.batch_norm(params, state, x[0], True, momentum=0.9**K)[1]
        assert_close(moved, wanted, TOLERANCE)


class TestDomains:
    @pytest.mark.parametrize("train", [True, False])
    def test_domains_equal_layers_on_parts(self, train):
        params, _, x = problem()
        states = {
            "mean": jnp.arange(3.0 * FEATURES).reshape(3, FEATURES),
            "var": jnp.arange(1.0, 1 + 3 * FEATURES).reshape(3, FEATURES),
        }
        whole = x.reshape(K * N, FEATURES)
        domain = jnp.asarray(np.random.default_rng(1).integers(0, 2, K * N))
        by_domain = recipes()["by_domain"]
        y, new = by_domain(params, states, whole, domain, train)
        for k in range(2):
            state = jax.tree.map(lambda leaf, k=k: leaf[k], states)
            part = whole[domain == k]
            wanted, wanted_state = jaxbn.batch_norm(params, state, part, train)
            assert_close(y[domain == k], wanted, TOLERANCE)
            got_state = jax.tree.map(lambda leaf, k=k: leaf[k], new)
            assert_close(got_state, wanted_state, TOLERANCE)
        # No example of the third domain is in the batch.
        assert_equal(*(jax.tree.map(lambda leaf: leaf[2], tree) for tree in (new, states)))

    def test_gradients_are_those_of_the_parts(self):
        params, state, x = problem()
        states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), state)
        whole, domain = x.reshape(K * N, FEATURES), jnp.arange(K * N) % 2
        by_domain = recipes()["by_domain"]

        def together(params, x):
            return jnp.sum(jnp.sin(by_domain(params, states, x, domain, True)[0]))

        def apart(params, x):
            parts = (jaxbn.batch_norm(params, state, x[domain == k], True)[0] for k in range(2))
            return sum(jnp.sum(jnp.sin(part)) for part in parts)

        got, wanted = (jax.grad(f, (0, 1))(params, whole) for f in (together, apart))
        assert_close(got, wanted, 1e-11)


def test_ensembles_equal_their_members():
    params, state, x = problem()
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, leaf - 1]), params)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, 3 * leaf]), state)
    got = jax.vmap(gradient, in_axes=(0, 0, None))(members, states, x[0])
    for i in range(3):
        member, member_state = (jax.tree.map(lambda v, i=i: v[i], t) for t in (members, states))
        wanted = gradient(member, member_state, x[0])
        assert_close(jax.tree.map(lambda v, i=i: v[i], got), wanted, TOLERANCE)


def test_a_second_pass_has_training_s_outputs_and_gradients_and_tracks_nothing():
    model = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)
    params, state, x = problem()
    second = jaxbn.linen.override(model.apply, {"**": {"track": False}})
    tracking = jaxbn.linen.override(model.apply, {"**": {"track": True}})

    def run(apply, params, x):
        y, updates = apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updates["batch_stats"])

    got, (y, new) = jax.grad(partial(run, second), (0, 1), has_aux=True)(params, x[0])
    wanted, (wanted_y, moved) = jax.grad(partial(run, tracking), (0, 1), has_aux=True)(params, x[0])
    assert_equal((got, y), (wanted, wanted_y))
    assert_equal(new, state)
    assert not np.allclose(moved["mean"], state["mean"])


@pytest.mark.usefixtures("standard_promotion")
def test_averaged_statistics_exceed_the_exact_ones_by_the_variance_of_the_weights():
    rng = np.random.default_rng(1)
    # The weights after each of six steps.
    x, kernels = rng.normal(2, 3, (N, 3)), rng.normal(size=(6, 3, FEATURES))
    params, state, _ = problem()

    def statistics(kernel):
        options = {"momentum": 0.0, "running_variance": "biased"}
        return jaxbn.batch_norm(params, state, jnp.asarray(x @ kernel), True, **options)[1]

    ema = optax.ema(0.7)
    ema_state = ema.init({"kernel": jnp.asarray(kernels[0]), **statistics(kernels[0])})
    averaged: Any = {}
    for kernel in kernels:
        variables = {"kernel": jnp.asarray(kernel), **statistics(kernel)}
        averaged, ema_state = ema.update(variables, ema_state)
    share = 0.7 ** np.arange(5, -1, -1)
    share /= share.sum()
    mean_kernel = np.tensordot(share, kernels, 1)
    assert_close(averaged["kernel"], mean_kernel, TOLERANCE)

    exact = statistics(mean_kernel)
    assert_close(averaged["mean"], exact["mean"], TOLERANCE)
    excess = share @ (x @ (kernels - mean_kernel)).var(1)
    assert_close(averaged["var"], exact["var"] + excess, TOLERANCE)
    assert np.all(excess > 0.1 * exact["var"])


def test_merged_states_of_clients_are_those_of_all_data():
    _, _, x = problem()
    clients = [x[0, :5], x[1], x[2, :1].repeat(2, 0)]
    states = [{"mean": part.mean(0), "var": part.var(0, ddof=1)} for part in clients]
    merged = merge(states, [len(part) for part in clients])
    together = jnp.concatenate(clients)
    wanted = {"mean": together.mean(0), "var": together.var(0, ddof=1)}
    assert_close(merged, wanted, TOLERANCE)
    # The mean of the variances is another number, as the clients differ.
    assert not np.allclose(np.mean([s["var"] for s in states], 0), wanted["var"], rtol=0.1)


def test_a_schedule_of_the_momentum_makes_the_mean_of_the_steps():
    params, state, x = problem()

    @jax.jit
    def train_step(state, x, step):
        return jaxbn.batch_norm(params, state, x, True, momentum=(step - 1) / step)[1]

    counted = state | {"count": jnp.zeros((), jnp.int32)}
    for step, part in enumerate(x, 1):
        state = train_step(state, part, jnp.float64(step))
        options = {"momentum": None, "running_variance": "unbiased"}
        counted = jaxbn.batch_norm(params, counted, part, True, **options)[1]
    assert train_step._cache_size() == 1
    wanted = {"mean": x.mean((0, 1)), "var": x.var(1, ddof=1).mean(0)}
    assert_close(state, wanted, TOLERANCE)
    assert_close({k: counted[k] for k in wanted}, wanted, TOLERANCE)
