"""The same small network in Flax and in PyTorch, with the same numbers."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch

import jaxbn
import jaxbn.linen

WIDTHS = (4, 6)
NAMES = {
    "conv1": "conv1",
    "bn1": "bn1",
    "block/conv": "block.conv",
    "block/bn": "block.bn",
    "block": "block",
    "head": "head",
}


class Block(nn.Module):
    norm: dict
    relu: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(WIDTHS[1], (3, 3), padding=1, name="conv")(x)
        x = jaxbn.linen.BatchNorm(not train, name="bn", **{**jaxbn.PYTORCH, **self.norm})(x)
        return nn.relu(x) if self.relu else x


class Net(nn.Module):
    """A network with the options of each fault."""

    norm1: dict
    norm2: dict
    relu: bool = True
    classes: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(WIDTHS[0], (3, 3), padding=1, name="conv1")(x)
        norm = jaxbn.linen.BatchNorm(not train, name="bn1", **{**jaxbn.PYTORCH, **self.norm1})
        x = nn.relu(norm(x))
        x = Block(self.norm2, self.relu, name="block")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def net(norm1=(), norm2=(), **options):
    return Net({"use_bias": True, **dict(norm1)}, {"use_bias": True, **dict(norm2)}, **options)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(WIDTHS[0], WIDTHS[1], 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(WIDTHS[1])
        # In place, as in most networks, so that the output of the norm is overwritten.
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(WIDTHS[0])
        self.block = TorchBlock()
        self.head = torch.nn.Linear(WIDTHS[1], 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.block(x).mean((2, 3)))


def torch_net(dtype=torch.float64):
    """Make the network, with random values."""
    return with_random_values(TorchNet().to(dtype), seed=1)


def with_random_values(model, seed):
    """Return the network with values that differ from each other and from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.5, generator=generator)
    return model


def variables_of(model):
    """Return the parameters and statistics of a PyTorch network in Flax's layout."""

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy())

    variables = {"params": {}, "batch_stats": {}}
    for path, name in NAMES.items():
        module = model.get_submodule(name)
        params, stats = {}, {}
        if isinstance(module, torch.nn.Conv2d):
            params = {"kernel": array(module.weight).transpose(2, 3, 1, 0)}
        elif isinstance(module, torch.nn.Linear):
            params = {"kernel": array(module.weight).T}
        elif isinstance(module, torch.nn.BatchNorm2d):
            params = {"scale": array(module.weight)}
            stats = {"mean": array(module.running_mean), "var": array(module.running_var)}
        else:
            continue
        params["bias"] = array(module.bias)
        for collection, leaves in (("params", params), ("batch_stats", stats)):
            if leaves:
                *parents, last = path.split("/")
                node = variables[collection]
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaves
    return variables


def images(dtype=np.float64):
    return np.random.default_rng(2).normal(size=(4, 5, 5, 3)).astype(dtype)
