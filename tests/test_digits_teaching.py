"""The two files to copy: each runs by itself and learns, and both compute the same."""

import ast
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train_examples.common.data import digits
from train_examples.common.model import ConvNet
from train_examples.digits import train, train_nnx

FILES = [Path(module.__file__ or "") for module in (train, train_nnx)]
WIDTHS = (4, 6)
# In float64, after sums of a few thousand terms in each layer, and three steps.
TOLERANCE = 1e-10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_learns(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    epochs = re.findall(r"epoch (\d+): loss (\S+), test accuracy (\S+)%", capsys.readouterr().out)
    assert [int(number) for number, _, _ in epochs] == list(range(1, 11))
    losses, accuracies = ([float(epoch[column]) for epoch in epochs] for column in (1, 2))
    assert losses[-1] < 0.01 * losses[0]
    assert accuracies[-1] > 97


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_can_be_copied(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    standard = {"collections", "functools", "typing"}
    assert imported - standard == {"flax", "jax", "jaxbn", "numpy", "optax", "sklearn"}


@pytest.fixture(scope="module")
def state():
    """A small network before its first step, which has no warmup and so moves the parameters."""
    images = digits().train_images
    return train.create_state(train.ConvNet(WIDTHS), images[:1], train.optimizer(0.2, 9), seed=0)


def test_the_experiments_have_the_same_network(state):
    """Compare their programs: the same primitives on the same shapes, in the same order."""

    def programs(model):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        images = jnp.zeros((16, 8, 8, 1))
        yield jax.make_jaxpr(partial(model.init, train=False))(jax.random.key(0), images)
        yield jax.make_jaxpr(partial(model.apply, train=False))(variables, images)
        training = partial(model.apply, train=True, mutable=["batch_stats"])
        yield jax.make_jaxpr(training)(variables, images)

    ours, theirs = (list(map(str, programs(net(WIDTHS)))) for net in (train.ConvNet, ConvNet))
    assert ours == theirs
    assert ours != list(map(str, programs(ConvNet(WIDTHS, dtype=jnp.bfloat16))))


def layers(model):
    """The layers of the NNX model by the names that Linen gives them."""
    convs, norms = ([stage.layers[n] for stage in model.stages for n in at]
                    for at in ((0, 3), (1, 4)))  # fmt: skip
    return {
        **{f"Conv_{n}": conv for n, conv in enumerate(convs)},
        **{f"BatchNorm_{n}": norm for n, norm in enumerate(norms)},
        "Dense_0": model.dense,
    }


def test_both_take_the_same_steps(state, x64):
    dataset = digits()
    images, test_images = (
        part.astype(np.float64) for part in (dataset.train_images, dataset.test_images)
    )
    params, batch_stats = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64), (state.params, state.batch_stats)
    )
    state = train.TrainState.create(
        apply_fn=state.apply_fn, params=params, batch_stats=batch_stats, tx=state.tx
    )
    # Without values, which all come from the other.
    model = nnx.eval_shape(lambda: train_nnx.ConvNet(widths=WIDTHS, seed=0))
    for collection in (state.params, state.batch_stats):
        for name, leaves in collection.items():
            for leaf, value in leaves.items():
                getattr(layers(model)[name], leaf).set_value(value)
    optimizer = train_nnx.make_optimizer(model, 0.2, 9)

    rng = np.random.default_rng(0)
    epoch = train.batches(images, dataset.train_labels, size=32, rng=rng)
    model.train()
    for _, batch in zip(range(3), epoch, strict=False):
        state, metrics = train.train_step(state, *batch)
        loss = train_nnx.train_step(model, optimizer, *batch)
        np.testing.assert_allclose(loss, metrics.loss, rtol=TOLERANCE)
    for collection in (state.params, state.batch_stats):
        for name, leaves in collection.items():
            for leaf, value in leaves.items():
                ours = getattr(layers(model)[name], leaf)[...]
                assert ours.dtype == jnp.float64
                np.testing.assert_allclose(ours, value, rtol=TOLERANCE, atol=TOLERANCE)

    model.eval()
    before = np.asarray(model.stages[0].layers[1].mean[...])
    accuracy = train_nnx.evaluate(model, test_images, dataset.test_labels)
    assert accuracy == train.evaluate(state, test_images, dataset.test_labels)
    np.testing.assert_array_equal(model.stages[0].layers[1].mean[...], before)


def test_batches_hold_each_image_at_most_once():
    images, labels = np.arange(10)[:, None], np.arange(10)
    for module in (train, train_nnx):
        rng = np.random.default_rng(0)
        epoch = list(module.batches(images, labels, size=4, rng=rng))
        assert [len(y) for _, y in epoch] == [4, 4]
        for x, y in epoch:
            np.testing.assert_array_equal(x[:, 0], y)
        assert len(set(np.concatenate([y for _, y in epoch]))) == 8
