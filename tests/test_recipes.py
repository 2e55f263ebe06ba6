"""The identities of docs/recipes.md, in float64, with the functions that the page defines."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn
import jaxbn.linen
from jaxbn.calibrate import merge, recalibrate
from tests.calibration import Chain, Norm
from tests.close import assert_close, assert_equal
from tests.pages import run_sections

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


def recipe(*headings):
    return run_sections("recipes.md", *headings)


def loss(params, state, x, **options):
    y, new = jaxbn.batch_norm(params, state, x, True, **options)
    return jnp.mean(jnp.sin(y)), (y, new)


def tracked_loss(params, state, x):
    """Return the loss and the new state, as the page's functions take them."""
    value, (_, new) = loss(params, state, x)
    return value, new


gradient = jax.grad(loss, has_aux=True)


class TestAccumulatedGradients:
    def test_micro_batches_equal_one_batch_with_ghost_batches(self):
        params, state, x = problem()
        accumulate = recipe("Accumulated gradients")["accumulate"]
        got, new = accumulate(tracked_loss, params, state, x)
        whole = x.reshape(K * N, FEATURES)
        wanted, (y, wanted_new) = gradient(params, state, whole, virtual_batch_size=N)
        assert_close((got, new), (wanted, wanted_new), TOLERANCE)
        outputs = jnp.stack([gradient(params, state, part)[1][0] for part in x])
        assert_close(outputs.reshape(y.shape), y, TOLERANCE)

    @pytest.mark.usefixtures("standard_promotion")
    def test_with_optax(self):
        params, state, x = problem()
        tx = optax.MultiSteps(optax.sgd(0.1), K, accumulator_dtype=jnp.float64)
        with_multi_steps = recipe("Accumulated gradients")["with_multi_steps"]
        trained, new_state = with_multi_steps(tracked_loss, tx, params, state, x, K)
        # The second update begins from the result of the first.
        again, _ = with_multi_steps(tracked_loss, tx, trained, new_state, x, K)
        twice = with_multi_steps(tracked_loss, tx, params, state, [*x, *x], K)[0]
        assert_close(twice, again, TOLERANCE)

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
        by_domain = recipe("Two domains, or K")["by_domain"]
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

    def test_other_domains_are_not_normalized(self):
        params, state, x = problem()
        states = jax.tree.map(lambda leaf: leaf[None], state)
        domain = jnp.where(jnp.arange(N) < 4, -1, 0).at[0].set(7)
        y, new = recipe("Two domains, or K")["by_domain"](params, states, x[0], domain, True)
        wanted, wanted_state = jaxbn.batch_norm(params, state, x[0, 4:], True)
        assert_close(y[4:], wanted, TOLERANCE)
        assert_equal(y[:4], jnp.broadcast_to(params["bias"], y[:4].shape))
        assert_close(jax.tree.map(lambda leaf: leaf[0], new), wanted_state, TOLERANCE)

    def test_gradients_are_those_of_the_parts(self):
        params, state, x = problem()
        states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), state)
        whole, domain = x.reshape(K * N, FEATURES), jnp.arange(K * N) % 2
        by_domain = recipe("Two domains, or K")["by_domain"]

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
    step = recipe("Ensembles")["step"]

    def run(params, state, x):
        y, vjp, new = jax.vjp(lambda params, x: step(params, state, x), params, x, has_aux=True)
        return y, vjp(jnp.sin(y)), new

    got = jax.vmap(run, in_axes=(0, 0, None))(members, states, x[0])
    for i in range(3):
        member, member_state = (jax.tree.map(lambda v, i=i: v[i], t) for t in (members, states))
        wanted = run(member, member_state, x[0])
        assert_close(jax.tree.map(lambda v, i=i: v[i], got), wanted, TOLERANCE)


SECOND_PASSES = "Second passes: SAM, VAT, adversarial training"


class TestSecondPasses:
    @pytest.fixture
    def names(self, monkeypatch):
        """Return the names of the page, whose model has other variables, in float64."""
        names = recipe(SECOND_PASSES)
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), names["variables"]
        )
        monkeypatch.setitem(names, "variables", variables)
        monkeypatch.setitem(names, "x", jnp.asarray(rng.normal(2, 3, (64, 8))))
        return names

    def test_they_have_training_s_outputs_and_track_nothing(self, names):
        variables, call = names["variables"], {"train": True, "mutable": ["batch_stats"]}
        tracking = jaxbn.linen.override(names["model"].apply, {"**": {"track": True}})
        wanted, moved = tracking(variables, names["x"], **call)
        y, kept = names["second"](variables, names["x"], **call)
        assert_equal(y, wanted)
        assert_equal(kept["batch_stats"], variables["batch_stats"])
        mean = moved["batch_stats"]["BatchNorm_0"]["mean"]
        assert not np.allclose(mean, variables["batch_stats"]["BatchNorm_0"]["mean"])

    @pytest.mark.usefixtures("standard_promotion")
    def test_sam_takes_the_gradient_of_training_at_the_worst_point(self, names):
        params, statistics = names["variables"]["params"], names["variables"]["batch_stats"]

        def loss(params):
            y, updates = names["model"].apply(
                {"params": params, "batch_stats": statistics},
                names["x"],
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(y**4), updates

        ascent, wanted_updates = jax.grad(loss, has_aux=True)(params)
        length = optax.tree.norm(ascent)
        worst = jax.tree.map(lambda p, g: p + 0.3 * g / length, params, ascent)
        wanted = jax.grad(loss, has_aux=True)(worst)[0]
        got, updates = names["sam_gradient"](params, rho=0.3)
        # Flax's layer, which the model has in its first pass, takes the variance from squares.
        assert_close(got, wanted, 1e-11, of_largest=True)
        assert_equal(updates, wanted_updates)


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


def test_merging_clients_of_a_network_is_exact_in_the_first_layer_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(60, 4)) + np.linspace(-2, 2, 60)[:, None])
    network = Chain(norm=Norm)
    variables = network.init(jax.random.key(0), x.astype(jnp.float32), train=False)
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), variables)

    def exact(*batches):
        return recalibrate(network, variables, batches, train=False)["batch_stats"]

    clients = x[:20], x[20:]
    merged = merge([exact(part) for part in clients], [20, 40])
    wanted = exact(*clients)
    assert_close(merged["BatchNorm_0"], wanted["BatchNorm_0"], TOLERANCE)
    later = ("BatchNorm_1", "BatchNorm_2", "BatchNorm_3")
    assert not any(np.allclose(merged[k]["var"], wanted[k]["var"], rtol=0.1) for k in later)


SCHEDULE = "A schedule of the momentum"


def test_a_schedule_of_the_momentum_makes_the_mean_of_the_steps(monkeypatch):
    params, state, x = problem()
    names = recipe(SECOND_PASSES, SCHEDULE)
    monkeypatch.setitem(names, "params", params)
    train_step = names["train_step"]
    compiled = train_step._cache_size()
    counted = state | {"count": jnp.zeros((), jnp.int32)}
    for step, part in enumerate(x, 1):
        state = train_step(state, part, jnp.float64(step))
        options = {"momentum": None, "running_variance": "unbiased"}
        counted = jaxbn.batch_norm(params, counted, part, True, **options)[1]
    assert train_step._cache_size() == compiled + 1
    wanted = {"mean": x.mean((0, 1)), "var": x.var(1, ddof=1).mean(0)}
    assert_close(state, wanted, TOLERANCE)
    assert_close({k: counted[k] for k in wanted}, wanted, TOLERANCE)


def test_the_schedule_sets_the_momentum_of_layers():
    names = recipe(SECOND_PASSES, SCHEDULE)
    # With momentum 0, the statistics become those of the batch.
    forgetful = jaxbn.linen.override(names["model"].apply, {"**": {"momentum": 0.0}})
    _, wanted = forgetful(names["variables"], names["x"], train=True, mutable=["batch_stats"])
    # Compiled, sums of 64 values in float32 may be rounded in another order.
    assert_close(names["updates"], wanted, 1e-5)
