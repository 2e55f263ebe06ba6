"""`check` finds copies of running statistics on several devices that are not equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
from jaxbn.calibrate import merge
from jaxbn.health import check
from tests.calibration import Scanned
from tests.health import LAYERS, NNX, Linen, codes, data, shuffled
from tests.raises import raises

COPIES = 4
TEXT = (
    "The running statistics of 4 devices differ by up to {} standard deviations (feature {}). Each "
    "device tracked only its own share of the data. Merge the statistics (jaxbn.calibrate.merge), "
    "and share them in training: give the layers an axis_name, or average the statistics over the "
    "devices (jax.lax.pmean)."
)


def replicated(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * COPIES), tree)


def spread(tree):
    """Make copies whose means and variances differ by a quarter."""
    factors = jnp.linspace(1, 1.25, COPIES, dtype=jnp.float32)
    return jax.tree.map(lambda leaf: leaf * factors[:, None], replicated(tree))


def linen(statistics):
    """Return a recalibrated model, and its variables as `pmap` keeps them."""
    network = Linen().recalibrate(shuffled())
    variables = {**network.variables, "batch_stats": statistics(network.variables["batch_stats"])}
    return network.model, {**variables, "params": replicated(variables["params"])}


def linen_statistics(statistics):
    """Return the model, and variables of which only the statistics have copies."""
    network = Linen().recalibrate(shuffled())
    copies = statistics(network.variables["batch_stats"])
    return network.model, {**network.variables, "batch_stats": copies}


def nnx_state(statistics):
    model = NNX().recalibrate(shuffled()).model
    graphdef, stats, others = nnx.split(model, nnx.BatchStat, ...)
    return graphdef, nnx.merge_state(statistics(stats), replicated(others))


def nnx_statistics(statistics):
    model = NNX().recalibrate(shuffled()).model
    return model, statistics(nnx.state(model, nnx.BatchStat))


def nnx_module(statistics):
    """Return a module whose own variables have copies."""
    return nnx.merge(*nnx_state(statistics)), None


MODELS = [linen, linen_statistics, nnx_state, nnx_statistics, nnx_module]


@pytest.mark.parametrize("make", MODELS)
def test_equal_copies_are_one_model(make):
    report = check(*make(replicated), shuffled())
    assert report.ok
    assert max(row.change for row in report.layers) < 1e-5


@pytest.mark.parametrize("make", MODELS)
def test_copies_that_differ(make):
    report = check(*make(spread), shuffled())
    assert codes(report) == [(layer, "replicas-differ") for layer in sorted(LAYERS)]
    # The first copy is exact.
    assert max(row.change for row in report.layers) < 1e-5


def test_the_largest_difference_and_its_repair():
    model = jaxbn.linen.BatchNorm(use_running_average=True)
    x = np.random.default_rng(0).normal(size=(COPIES, 64, 2)).astype("float32")
    # Each device has data of another domain in the second feature.
    x[..., 1] += np.arange(COPIES, dtype="float32")[:, None]
    states = [{"mean": shard.mean(0), "var": shard.var(0)} for shard in x]
    variables = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": {k: jnp.stack([s[k] for s in states]) for k in ("mean", "var")},
    }
    batches = [x.reshape(-1, 2)]
    report = check(model, variables, batches)
    means, variances = (np.stack([s[k][1] for s in states]) for k in ("mean", "var"))
    largest = np.ptp(means) / np.sqrt(variances.mean())
    assert report.findings[0] == ("", "replicas-differ", TEXT.format(f"{largest:.3g}", 1))
    merged = merge(states, [64] * COPIES, running_variance="biased")
    assert check(model, {**variables, "batch_stats": merged}, batches).ok


def test_rounding_is_not_a_difference():
    model, variables = linen(replicated)
    rounded = jax.tree.map(lambda leaf: leaf.at[1].multiply(1 + 2.0**-22), variables["batch_stats"])
    assert check(model, {**variables, "batch_stats": rounded}, shuffled()).ok


def test_layers_of_a_scan_are_not_copies():
    """They have a leading axis, but the model fits their variables as they are."""
    x = [np.stack([x, x + 1], 1) for x in shuffled()]
    model = Scanned()
    variables = model.init(jax.random.key(0), x[0], train=False)
    variables = jaxbn.calibrate.recalibrate(model, variables, x, train=False)
    assert check(model, variables, x, train=False).ok


@pytest.mark.parametrize("make", [linen, nnx_state])
def test_an_ensemble_is_not_one_model(make):
    model, variables = make(replicated)
    if isinstance(variables, nnx.State):
        variables["first"]["kernel"].set_value(variables["first"]["kernel"][...].at[1].add(1))
        path = "['first']['kernel'].value"
    else:
        kernel = variables["params"]["first"]["kernel"]
        variables["params"]["first"]["kernel"] = kernel.at[1].add(1)
        path = "['first']['kernel']"
    with raises(
        ValueError,
        f"variables must be those of one model, got 4 copies whose parameters differ at {path}, as "
        f"in an ensemble. Check each copy i separately, with the variables "
        f"jax.tree.map(lambda leaf: leaf[i], variables).",
    ):
        check(model, variables, data())


def test_variables_that_never_fit_raise_the_error_of_the_model():
    model, variables = linen(replicated)
    variables["params"]["first"]["kernel"] = jnp.zeros((COPIES, 5, 8))
    with pytest.raises(Exception, match='"kernel" in "/first"'):
        check(model, variables, data())


def test_arrays_that_are_marked_as_replicated():
    """Without its check, `shard_map` believes that its outputs are equal on all devices."""
    mesh = jax.make_mesh((COPIES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    x = np.concatenate(data())
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    def step(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])[1]

    updated = {**variables, **step(variables, x)}
    (first, *_) = check(layer, updated, data()).findings
    means = np.stack([part.mean(0) for part in np.split(x, COPIES)])
    variances = np.stack([part.var(0) for part in np.split(x, COPIES)])
    largest = np.ptp(means, axis=0) / np.sqrt(variances.mean(0))
    text = TEXT.format(f"{largest.max():.3g}", largest.argmax())
    assert first == ("", "replicas-differ", text)

    shared = layer.clone(axis_name="data")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
    def shared_step(variables, x):
        return shared.apply(variables, x, mutable=["batch_stats"])[1]

    assert check(layer, {**variables, **shared_step(variables, x)}, data()).ok
