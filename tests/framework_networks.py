"""The network of `small_networks` without its convolutions, in NNX and in Keras, too."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.small_networks import with_random_values

WIDTHS = (3, 5, 4)
# The names in Linen, NNX and Keras, and those in PyTorch.
NAMES = {"dense": "0", "block/norm": "1.norm", "block/head": "1.head"}


class LinenBlock(nn.Module):
    options: dict
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        norm = {**jaxbn.PYTORCH, **self.options}
        x = nn.relu(jaxbn.linen.BatchNorm(not train, name="norm", **norm)(x))
        x = nn.Dropout(self.dropout, deterministic=not train, name="drop")(x)
        return nn.Dense(WIDTHS[2], name="head")(x)


class LinenNet(nn.Module):
    options: dict
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTHS[1], name="dense")(x)
        return LinenBlock(self.options, self.dropout, name="block")(x, train)


class NnxBlock(nnx.Module):
    def __init__(self, rngs, dropout, options):
        norm = {**jaxbn.PYTORCH, **options}
        self.norm = jaxbn.nnx.BatchNorm(WIDTHS[1], rngs=rngs, **norm)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(*WIDTHS[1:], rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(x))))


class NnxNet(nnx.Module):
    def __init__(self, rngs, dropout, options):
        self.dense = nnx.Linear(*WIDTHS[:2], rngs=rngs)
        self.block = NnxBlock(rngs, dropout, options)

    def __call__(self, x):
        return self.block(self.dense(x))


class TorchBlock(torch.nn.Module):
    def __init__(self, dropout, options):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(WIDTHS[1], **options)
        self.relu = torch.nn.ReLU(inplace=True)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(*WIDTHS[1:])

    def forward(self, x):
        return self.head(self.drop(self.relu(self.norm(x))))


def torch_net(dropout=0.0, dtype=torch.float32, **options):
    """Make the network, with random values."""
    model = torch.nn.Sequential(torch.nn.Linear(*WIDTHS[:2]), TorchBlock(dropout, options))
    return with_random_values(model.to(dtype), seed=3)


def leaves_of(model):
    """Return the leaves of each layer of a PyTorch network, by its name in Flax."""

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy())

    found = {}
    for path, name in NAMES.items():
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Linear):
            found[path] = {"kernel": array(module.weight).T, "bias": array(module.bias)}
        else:
            found[path] = {
                "scale": array(module.weight),
                "bias": array(module.bias),
                "mean": array(module.running_mean),
                "var": array(module.running_var),
            }
    return found


def linen_net(model, dropout=0.0, **options):
    """Return the module in Linen and its variables, with the numbers of a PyTorch network."""
    leaves = leaves_of(model)
    norm = leaves["block/norm"]
    params = {"dense": leaves["dense"], "block": {"head": leaves["block/head"]}}
    params["block"]["norm"] = {k: norm[k] for k in ("scale", "bias")}
    stats = {"block": {"norm": {k: norm[k] for k in ("mean", "var")}}}
    return LinenNet(options, dropout), {"params": params, "batch_stats": stats}


def nnx_net(model, dropout=0.0, **options):
    """Return the module in NNX, with the numbers of a PyTorch network."""
    result = NnxNet(nnx.Rngs(0), dropout, options)
    layers = {"dense": result.dense, "block/norm": result.block.norm}
    layers["block/head"] = result.block.head
    for path, leaves in leaves_of(model).items():
        for name, value in leaves.items():
            getattr(layers[path], name).set_value(value)
    return result


def keras_net(model, dropout=0.0, **options):
    """Return the model in Keras, with the numbers of a PyTorch network."""
    import keras

    inner = keras.Input(WIDTHS[1:2])
    y = keras.layers.BatchNormalization(name="norm", **options)(inner)
    y = keras.layers.Dropout(dropout, name="drop")(keras.layers.ReLU()(y))
    block = keras.Model(inner, keras.layers.Dense(WIDTHS[2], name="head")(y), name="block")
    x = keras.Input(WIDTHS[:1])
    dense = keras.layers.Dense(WIDTHS[1], name="dense")
    result = keras.Model(x, block(dense(x)))
    layers = {"dense": dense, "block/norm": block.get_layer("norm")}
    layers["block/head"] = block.get_layer("head")
    for path, leaves in leaves_of(model).items():
        layers[path].set_weights([np.asarray(leaf) for leaf in leaves.values()])
    return result


def rows(dtype=np.float32, n=12):
    return np.random.default_rng(4).normal(size=(n, WIDTHS[0])).astype(dtype)
