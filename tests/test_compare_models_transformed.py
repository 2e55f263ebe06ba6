"""Comparing networks whose layers are called twice, or inside a transformation."""

import flax.linen as nn
import jax
import numpy as np
import torch
from flax import nnx

from jaxbn.parity import compare_models
from tests.raises import raises

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


class Remat(nn.Module):
    """A layer that is called twice, and one that is recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(3, name="twice")
        x = twice(nn.relu(twice(x)))
        x = nn.remat(nn.Dense)(3, name="recomputed")(x)
        return nn.Dense(2, name="head")(x)


def networks():
    module = Remat()
    variables = module.init(jax.random.key(0), X)
    twice = torch.nn.Linear(3, 3)
    theirs = torch.nn.Sequential(
        *(twice, torch.nn.ReLU(), twice, torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    )
    pairs = {"twice": 0, "recomputed": 3, "head": 4}
    with torch.no_grad():
        for name, i in pairs.items():
            leaves = variables["params"][name]
            theirs[i].weight.copy_(torch.tensor(np.asarray(leaves["kernel"]).T))
            theirs[i].bias.copy_(torch.tensor(np.asarray(leaves["bias"])))
    return (module, variables), theirs


def test_such_layers_are_left_out_and_noted():
    # Four layers of three terms each.
    report = compare_models(*networks(), X, rtol=1e-5)
    assert report.ok, str(report)
    assert {row.name for row in report.rows} == {"head", "(input)", "(output)"}
    assert report.notes == (
        "not compared, since they are called several times or inside a transformation such as "
        "nn.scan: twice, recomputed",
    )


def test_a_name_inside_a_transformation():
    with raises(
        ValueError,
        "recomputed in Flax is inside a transformation, such as nn.scan or nn.remat, so its output "
        "cannot be recorded; leave it out of names.",
    ):
        compare_models(*networks(), X, {"recomputed": "3"})


def test_layers_inside_a_transformation_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(3, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.remat(lambda inner, x: inner(x))(self.inner, x))

    model = Net(nnx.Rngs(0))
    report = compare_models(model, model, X, rtol=0)
    assert report.ok, str(report)
    assert {row.name for row in report.rows} == {"head", "(input)", "(output)"}
