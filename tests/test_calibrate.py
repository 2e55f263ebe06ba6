"""`recalibrate` is one training step on all data, however it is cut; `merge` is it on shards."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import merge, recalibrate
from tests import oracle

N = 101
CUTS = {"one": [N], "two": [50, 51], "odd last": [32, 32, 32, 5], "tiny": [1, 1, 1, 98]}
# Rounding of float32 statistics of values near one, through four layers; of float64 ones, the same.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def cut(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


def data(dtype="float32", shape=(N, 3, 4)):
    rng = np.random.default_rng(0)
    # Rows of different means, so that the parts of a cut differ.
    x = rng.normal(size=shape) + np.linspace(-2, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return x.astype(dtype)


def assert_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# Networks.


pytorch_norm = partial(jaxbn.linen.BatchNorm, **jaxbn.PYTORCH)


class Chain(nn.Module):
    norm: Callable[..., Any] = pytorch_norm

    @nn.compact
    def __call__(self, x, train):
        for _ in range(4):
            x = nn.Dense(8, param_dtype=x.dtype)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return x


class Branches(nn.Module):
    norm: Callable[..., Any] = pytorch_norm

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.norm, use_running_average=not train)
        x = norm()(nn.Dense(8, param_dtype=x.dtype)(x))
        left = nn.tanh(norm(axis=(0, -1) if x.ndim == 2 else -1)(nn.relu(x)))
        right = norm(axis=1)(x) if x.ndim == 3 else norm()(x)
        return norm()(x + left * right)


class Block(nn.Module):
    norm: Callable[..., Any]
    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1], param_dtype=x.dtype)(x)
        return nn.tanh(self.norm(use_running_average=not self.train)(x)), None


class Scanned(nn.Module):
    norm: Callable[..., Any] = pytorch_norm

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, axes, split_rngs={"params": True}, length=3)
        return blocks(self.norm, train)(x)[0]


class Rematerialized(nn.Module):
    norm: Callable[..., Any] = pytorch_norm

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x, _ = nn.remat(Block)(self.norm, train)(x)
        return x


class Noisy(jaxbn.linen.BatchNorm):
    """Inherits, and does something of its own."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x, use_running_average, mask=mask) + 1


NETWORKS = {
    "chain": Chain,
    "branches": Branches,
    "scanned": Scanned,
    "rematerialized": Rematerialized,
    "inherited": partial(Chain, norm=Noisy),
    "other convention": partial(Chain, norm=partial(jaxbn.linen.BatchNorm, **jaxbn.EXERCISE)),
    "without parameters": partial(
        Chain, norm=partial(jaxbn.linen.BatchNorm, use_scale=False, use_bias=False)
    ),
    "Flax's": partial(Chain, norm=partial(nn.BatchNorm, use_fast_variance=False)),
    "Flax's, scanned": partial(Scanned, norm=partial(nn.BatchNorm, use_fast_variance=False)),
}


def initialized(make, x):
    """The network and variables, with statistics that are far from right."""
    network = make()
    variables = network.init(jax.random.key(0), jnp.asarray(x), train=False)
    variables = {k: jax.tree.map(lambda v: v.astype(x.dtype), c) for k, c in variables.items()}
    return network, {
        **variables,
        "batch_stats": jax.tree.map(lambda v: 100 * (v + 3), variables["batch_stats"]),
    }


def one_step(network, variables, x):
    """What a training step on all of `x` leaves where nothing of the past is kept."""
    forgetful = network.clone(norm=partial(network.norm, momentum=0.0))
    apply = jax.jit(partial(forgetful.apply, train=True, mutable=["batch_stats"]))
    return apply(variables, jnp.asarray(x))[1]["batch_stats"]


CASES = [(name, "odd last") for name in NETWORKS] + [("chain", "one"), ("chain", "tiny")]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name, sizes", CASES)
def test_is_one_step_on_all_data(name, sizes, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = data(dtype)
        network, variables = initialized(NETWORKS[name], x)
        want = one_step(network, variables, x)
        got = recalibrate(network, variables, cut(x, CUTS[sizes]), train=True)
        assert_close(got["batch_stats"], want, TOLERANCE[dtype])


def test_a_step_on_each_batch_is_something_else():
    """The comparison can fail: neither the mean of the batches' statistics nor one pass will do."""
    x = data()
    network, variables = initialized(Chain, x)
    want = one_step(network, variables, x)
    steps = [one_step(network, variables, part) for part in cut(x, CUTS["odd last"])]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *steps)
    pooled = merge(steps, [3 * n for n in CUTS["odd last"]])
    for other, layer in ((mean, "BatchNorm_0"), (pooled, "BatchNorm_1")):
        with pytest.raises(AssertionError):
            assert_close(other[layer], want[layer], 1e-2)
    assert_close(pooled["BatchNorm_0"], want["BatchNorm_0"], TOLERANCE["float32"])


def test_far_from_zero():
    x = (1e4 + np.random.default_rng(0).normal(size=(1000, 8))).astype("float32")
    layer = jaxbn.linen.BatchNorm(use_running_average=False, **jaxbn.FLAX)
    # A second layer sees the first one's output, which the mean's last digit would move.
    model = nn.Sequential([layer, layer.clone(parent=None)])
    variables = model.init(jax.random.key(0), x)
    got = recalibrate(model, variables, cut(x, [300, 300, 400]))["batch_stats"]
    truth = oracle.batch_norm(x, x)
    eps = np.finfo("float32").eps
    assert oracle.error(got["layers_0"]["mean"], truth.mean) < eps
    assert oracle.error(got["layers_0"]["var"], truth.var) < 4 * eps
    second = oracle.batch_norm(truth.y, x)
    assert np.abs(got["layers_1"]["mean"]).max() < 4 * eps
    assert oracle.error(got["layers_1"]["var"], second.var) < 8 * eps


def test_half_precision():
    x = jnp.asarray(data(), jnp.bfloat16)
    network = Chain(partial(jaxbn.linen.BatchNorm, dtype=jnp.bfloat16))
    variables = network.init(jax.random.key(0), x, train=False)
    want = one_step(network, variables, x)
    got = recalibrate(network, variables, [x[:50], x[50:]], train=True)["batch_stats"]
    # Outputs at the border between two numbers of bfloat16 may fall either way.
    assert_close(got, want, 1e-3)


def test_only_statistics_differ():
    x = data()
    network, variables = initialized(Chain, x)
    variables = {**variables, "cache": {"seen": jnp.ones(3)}}
    before = jax.tree.map(np.array, variables)
    got = recalibrate(network, variables, cut(x, CUTS["two"]), train=True, mutable=["batch_stats"])
    assert got["params"] is variables["params"] and got["cache"] is variables["cache"]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    frozen = recalibrate(network, freeze(variables), cut(x, CUTS["two"]), train=True)
    assert jax.tree.structure(frozen) == jax.tree.structure(freeze(variables))
    jax.tree.map(np.testing.assert_array_equal, frozen.unfreeze(), got)


def test_count_stays():
    layer = pytorch_norm(momentum=None, use_running_average=False)
    x = data()
    variables: Any = layer.init(jax.random.key(0), x)
    variables["batch_stats"]["count"] += 7
    got = recalibrate(layer, variables, iter([x[:3], x[3:]]))["batch_stats"]
    assert got["count"] == 7
    np.testing.assert_allclose(got["mean"], x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(got["var"], x.var((0, 1), ddof=1), rtol=1e-6)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        x = pytorch_norm(use_running_average=not train)(x, mask=mask)
        return pytorch_norm(use_running_average=not train)(nn.tanh(x), mask=mask)


@pytest.mark.parametrize("form", [lambda x, m: (x, m), lambda x, m: {"x": x, "mask": m}])
def test_masks(form):
    x, mask = data(), np.random.default_rng(1).random((N, 3, 1)) < 0.7
    mask[:20] = False
    variables = TwoInputs().init(jax.random.key(0), x, mask, train=False)
    hidden = np.where(mask, x, np.nan)
    pieces = zip(cut(hidden, [20, 50, 31]), cut(mask, [20, 50, 31]), strict=True)
    got = recalibrate(TwoInputs(), variables, [form(*piece) for piece in pieces], train=True)
    wanted = TwoInputs().init(jax.random.key(0), x[mask[..., 0]], None, train=False)
    want = recalibrate(TwoInputs(), wanted, [(x[mask[..., 0]], None)], train=True)
    assert_close(got["batch_stats"], want["batch_stats"], TOLERANCE["float32"])


def test_features_without_values_keep_their_statistics():
    x, mask = data(shape=(10, 3)), np.ones((10, 3), bool)
    mask[:, 1], mask[1:, 2] = False, False
    variables = TwoInputs().init(jax.random.key(0), x, mask, train=False)
    got = recalibrate(TwoInputs(), variables, [(x, mask)], train=True)
    stats = got["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], [x[:, 0].mean(), 0, x[0, 2]], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [x[:, 0].var(ddof=1), 1, 1], rtol=1e-6)


class CalledTwice(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = pytorch_norm(use_running_average=not train)
        return norm(3 * nn.tanh(norm(x)) + 1)


def test_a_layer_called_twice_keeps_both_calls():
    x = data()
    variables = CalledTwice().init(jax.random.key(0), x, train=False)
    got = recalibrate(CalledTwice(), variables, cut(x, CUTS["odd last"]), train=True)
    first = x.astype("float64")
    second = (first - first.mean((0, 1))) / np.sqrt(first.var((0, 1)) + 1e-5)
    both = np.concatenate([first, 3 * np.tanh(second) + 1])
    np.testing.assert_allclose(got["batch_stats"]["BatchNorm_0"]["mean"], both.mean((0, 1)), 1e-5)
    var = both.var((0, 1), ddof=1)
    np.testing.assert_allclose(got["batch_stats"]["BatchNorm_0"]["var"], var, 1e-5)


class PartlyFrozen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = pytorch_norm(use_running_average=True)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return pytorch_norm(use_running_average=not train)(x)


def test_modes():
    """In training mode frozen layers stay; in evaluation mode none does, and nothing drops out."""
    x = data()
    variables = PartlyFrozen().init(jax.random.key(0), x, train=False)
    rngs = {"dropout": jax.random.key(1)}
    stats = recalibrate(PartlyFrozen(), variables, [x], train=True, rngs=rngs)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, *(s["BatchNorm_0"] for s in
                                                  (stats, variables["batch_stats"])))  # fmt: skip
    dropped: Any = PartlyFrozen().apply(
        variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
    )[1]
    moved = dropped["batch_stats"]["BatchNorm_1"]["mean"]
    np.testing.assert_allclose(stats["BatchNorm_1"]["mean"], 10 * moved, rtol=1e-4, atol=1e-6)
    stats = recalibrate(PartlyFrozen(), variables, [x], train=False)["batch_stats"]
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["BatchNorm_1"]["var"], 1, rtol=5e-3)


def test_statistics_across_devices_need_no_axis():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="devices", axis=1,
                                  virtual_batch_size=4)  # fmt: skip
    x = data()
    got = recalibrate(layer, layer.init(jax.random.key(0), x), [x])["batch_stats"]
    np.testing.assert_allclose(got["mean"], x.mean((0, 2)), rtol=1e-5)


class Shuffled:
    """As a data loader is: each pass in another order."""

    def __init__(self, x):
        self.x, self.rng = x, np.random.default_rng(0)

    def __iter__(self):
        return iter(cut(self.rng.permutation(self.x), CUTS["odd last"]))


def test_batches_of_another_order_in_each_pass():
    x = data()
    network, variables = initialized(Chain, x)
    want = one_step(network, variables, x)
    got = recalibrate(network, variables, Shuffled(x), train=True)
    assert_close(got["batch_stats"], want, TOLERANCE["float32"])


# NNX.


class NNX(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([norm(4, rngs=rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

    def __call__(self, x, scale=1.0):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = self.dropout(nnx.relu(norm(dense(scale * x))))
        return x


class NoisyNNX(jaxbn.nnx.BatchNorm):
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x, use_running_average, mask=mask) + 1


NNX_NORMS = {
    "ours": jaxbn.nnx.BatchNorm,
    "Flax's": partial(nnx.BatchNorm, use_fast_variance=False),
    "inherited": NoisyNNX,
}


@pytest.mark.parametrize("mode", ["train", "eval", "graphdef", "statistics alone"])
@pytest.mark.parametrize("name", NNX_NORMS)
def test_nnx_is_one_step_on_all_data(name, mode):
    x = data()
    reference = NNX(partial(NNX_NORMS[name], momentum=0.0), nnx.Rngs(0))
    nnx.jit(lambda model, x: model(x, scale=1.5))(reference, x)
    want = nnx.to_pure_dict(nnx.state(reference, nnx.BatchStat))

    model = NNX(NNX_NORMS[name], nnx.Rngs(0))
    if mode == "eval":
        model.eval()
    graphdef, state = nnx.split(model)
    given = nnx.state(model, nnx.BatchStat) if mode == "statistics alone" else state
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    got = recalibrate(
        graphdef if mode == "graphdef" else model, given, cut(x, CUTS["odd last"]), scale=1.5
    )
    assert isinstance(got, nnx.State) and jax.tree.structure(got) == jax.tree.structure(given)
    assert nnx.graphdef(model) == graphdef
    after = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, after, before)

    nnx.update(model, got)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_close(stats, want, TOLERANCE["float32"])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)),
                 nnx.to_pure_dict(nnx.state(reference, nnx.Param)))  # fmt: skip


class NNXTransforms(nnx.Module):
    """Layers in a scan and under remat, and one called twice."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return jaxbn.nnx.BatchNorm(4, rngs=rngs)

        self.layers, self.norm = layers(rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs)
        self.again = self.norm

    def __call__(self, x):
        x = nnx.scan(lambda x, norm: nnx.tanh(3 * norm(x) + 1), in_axes=(nnx.Carry, 0),
                     out_axes=nnx.Carry)(x, self.layers)  # fmt: skip
        x = nnx.remat(lambda norm, x: norm(x))(self.norm, x)
        return self.again(nnx.relu(x))


def test_nnx_transforms():
    x = data()
    model = NNXTransforms(nnx.Rngs(0))
    (one, two) = (
        recalibrate(model, nnx.state(model), cut(x, CUTS[name])) for name in ("one", "odd last")
    )
    assert_close(one, two, TOLERANCE["float32"])
    np.testing.assert_allclose(one["layers"]["mean"][0], x.mean((0, 1)), rtol=1e-5)


# What bad input gets.


def test_errors():
    x = data()
    network, variables = initialized(Chain, x)
    run = partial(recalibrate, network, variables, train=True)
    with pytest.raises(ValueError) as error:
        run([])
    assert str(error.value) == "batches must hold at least one batch, got none."
    with pytest.raises(ValueError) as error:
        run([x[:50], np.where(x[50:] > 4, np.nan, x[50:])])
    assert str(error.value) == (
        "batches give statistics that are not finite in BatchNorm_0: look for NaN, infinity or "
        "values that overflow in them and in the weights."
    )
    with pytest.raises(ValueError) as error:
        run([x[0, :1]])
    assert str(error.value) == (
        "batches hold one value per feature in BatchNorm_0, which has no unbiased variance; give "
        "more values, or the layer running_variance='biased'."
    )
    with pytest.raises(ValueError) as error:
        recalibrate(network, {"params": variables["params"]}, [x], train=True)
    assert str(error.value) == "variables have no 'mean' and 'var' in BatchNorm_0."
    dense = nn.Dense(3)
    with pytest.raises(ValueError) as error:
        recalibrate(dense, dense.init(jax.random.key(0), x), [x])
    assert str(error.value) == (
        "model must have a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx, and call "
        "it; got one that calls none."
    )
    with pytest.raises(TypeError) as error:
        recalibrate(network.apply, variables, [x])
    assert str(error.value) == (
        "model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got method."
    )
    with pytest.raises(TypeError) as error:
        recalibrate(network, x, [x])
    assert str(error.value) == (
        "variables of a flax.linen.Module must be a mapping of collections, got ndarray."
    )
    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError) as error:
        recalibrate(layer, {}, [x])
    assert str(error.value) == (
        "variables of an NNX model must be an nnx.State, such as nnx.state(model), got dict."
    )


class Once:
    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_batches_that_are_used_up():
    x = data()
    network, variables = initialized(Chain, x)
    with pytest.raises(ValueError, match="batches were used up"):
        recalibrate(network, variables, Once([x, x]), train=True)


# Merging.


def state_of(x, ddof, count=None):
    state = {"mean": jnp.asarray(x.mean(0)), "var": jnp.asarray(x.var(0, ddof=ddof))}
    return state if count is None else {**state, "count": jnp.asarray(count)}


@pytest.mark.parametrize("estimator, ddof", [("unbiased", 1), ("biased", 0)])
def test_merged_shards_are_the_whole(x64, estimator, ddof):
    x = data("float64", (N, 4))
    sizes = [40, 3, 58]
    states = [state_of(part, ddof, i) for i, part in enumerate(cut(x, sizes))]
    got = merge(states, sizes, running_variance=estimator)
    assert_close(got, state_of(x, ddof, 3), 1e-13)
    trees = [{"a": {"norm": state}, "b": state} for state in states]
    tree = merge(trees, [jnp.asarray(n) for n in sizes], running_variance=estimator)
    assert_close(tree, {"a": {"norm": got}, "b": got}, 0)
    by_layer = [{"a": n, "b": 7 * n} for n in sizes]
    assert_close(merge(trees, by_layer, running_variance=estimator)["a"]["norm"], got, 0)


def test_merge_of_one_or_no_value(x64):
    x = data("float64", (5, 4))
    nothing = jax.tree.map(lambda leaf: leaf * np.nan, state_of(x, 1))
    single = {"mean": jnp.asarray(x[4]), "var": jnp.full(4, np.nan)}
    got = merge([nothing, state_of(x[:4], 1), single, nothing], [0, 4, 1, 0])
    assert_close(got, state_of(x, 1), 1e-13)


def test_merge_of_trees():
    """Every layer of a tree, whatever it is made of, is merged as it is alone."""
    x = data()
    _, variables = initialized(Chain, x)
    linen = variables["batch_stats"]
    state = nnx.state(jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.BatchStat)
    one, two = ({"mean": jnp.full(3, m), "var": jnp.full(3, m + 1)} for m in (0.0, 4.0))
    for tree in (linen, freeze(linen), state, [one, two], (one, [two, one]), {"a": [two]}):
        rng = np.random.default_rng(0)
        other = jax.tree.map(lambda leaf, rng=rng: leaf + rng.uniform(1, 2, leaf.shape), tree)
        got = merge([tree, other], [30, 10], running_variance="biased")
        assert jax.tree.structure(got) == jax.tree.structure(tree)
        leaves = [jax.tree.leaves(t) for t in (tree, other, got)]
        for i in range(0, len(leaves[0]), 2):  # mean and var, in the order of their names
            first, second, merged = (
                dict(zip(("mean", "var"), t[i : i + 2], strict=True)) for t in leaves
            )
            alone = merge([first, second], [30, 10], running_variance="biased")
            assert_close(merged, alone, 0)
            assert np.abs(merged["mean"] - first["mean"]).min() > 0.2


def test_merge_far_from_zero():
    x = (1e4 + np.random.default_rng(0).normal(size=(1000, 8))).astype("float32")
    parts = cut(x.astype("float64"), [300, 700])
    states = [{"mean": part.mean(0), "var": part.var(0, ddof=1)} for part in parts]
    got = merge(states, [300, 700])
    assert got["mean"].dtype == jnp.float32
    assert oracle.error(got["var"], x.astype("float64").var(0, ddof=1)) < 2e-7


S = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
MERGE_ERRORS = {
    "none": (([], []), "states and counts must be as many, and at least one, got 0 states and 0 "
                       "counts."),
    "too few counts": (([S, S], [1]), "states and counts must be as many, and at least one, got 2 "
                                      "states and 1 counts."),
    "shapes": (
        ([{"a": S}, {"a": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}], [2, 2]),
        "states must have the same shapes, got (2,), (3,) for 'mean' in a.",
    ),
    "names": (
        ([{"a": {"kernel": jnp.zeros(2)}}], [2]),
        "states must have 'mean' and 'var' in each layer, and may have 'count', got ['kernel'] in "
        "a.",
    ),
    "negative": (([S], [-1]), "counts must be integers, 0 at least, got -1."),
    "no integer": (([S], [1.5]), "counts must be integers, 0 at least, got 1.5."),
    "NaN": (([S], [float("nan")]), "counts must be integers, 0 at least, got nan."),
    "no value": (
        ([S, S], [0, 0]),
        "counts must add up to 2 at least, where the running variance is unbiased, got 0.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGE_ERRORS)
def test_merge_errors(name):
    args, message = MERGE_ERRORS[name]
    with pytest.raises(ValueError) as error:
        merge(*args)
    assert str(error.value) == message


def test_merge_errors_that_name_structures_and_estimators():
    with pytest.raises(ValueError, match=r"states must have one structure, got PyTreeDef"):
        merge([S, {"a": S}], [1, 1])
    with pytest.raises(ValueError, match="running_variance must be 'biased' or 'unbiased'"):
        merge([S], [2], running_variance="sample")
