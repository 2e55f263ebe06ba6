"""Training runs in both frameworks, with one interface."""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.typing import DTypeLike
from torch.nn import functional

import jaxbn
from jaxbn.linen import BatchNorm
from train_examples.common.model import ConvNet
from train_examples.digits import train
from train_examples.torch_twin import torch_model
from train_examples.torch_twin.config import Config

Variables = dict[str, Any]


class Batch(NamedTuple):
    """Images, (N, height, width, channels), and labels, (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def reordered(self, rng: np.random.Generator) -> "Batch":
        """Return the same examples in a random order."""
        order = rng.permutation(len(self.labels))
        return Batch(self.images[order], self.labels[order])


class Run(Protocol):
    """The training of a network by SGD with momentum."""

    def step(self, batch: Batch) -> float:
        """Take a step on a batch, and return the loss before it."""
        ...

    def entries(self) -> dict[str, np.ndarray]:
        """Return parameters and running statistics, with PyTorch's names and layout."""
        ...


def network(config: Config, dtype: DTypeLike = "float32") -> ConvNet:
    """Return the digits example's network, with batch norms of PyTorch's convention."""
    return ConvNet(config.widths, norm=partial(BatchNorm, **jaxbn.PYTORCH), dtype=dtype)


def initial(config: Config, images: np.ndarray) -> Variables:
    """Return the initial variables of all runs, in float32: those of the digits example."""
    model = network(config)
    state = train.create_state(model, images, optax.identity(), config.seed)
    return {"params": state.params, "batch_stats": state.batch_stats}


class FlaxRun:
    """A run in JAX, with the training step of the digits example."""

    def __init__(self, model: ConvNet, config: Config, variables: Variables) -> None:
        self.state = train.TrainState.create(
            apply_fn=model.apply,
            tx=optax.sgd(config.learning_rate, momentum=config.momentum),
            **jax.tree.map(lambda leaf: jnp.asarray(leaf, model.dtype), variables),
        )

    def step(self, batch: Batch) -> float:
        self.state, metrics = train.train_step(self.state, *batch)
        return float(metrics.loss)

    def entries(self) -> dict[str, np.ndarray]:
        params, batch_stats = jax.device_get((self.state.params, self.state.batch_stats))
        return torch_model.to_state_dict(params, batch_stats)


class TorchRun:
    """A run in PyTorch, from the entries of another run.

    With `reorder`, the examples of each batch are shuffled first, which changes only the rounding.
    """

    def __init__(
        self,
        config: Config,
        start: dict[str, np.ndarray],
        reorder: np.random.Generator | None = None,
    ) -> None:
        tensors = {name: torch.tensor(value) for name, value in start.items()}
        self.dtype = tensors["Dense_0.weight"].dtype
        self.model = torch_model.ConvNet(config.widths).to(self.dtype)
        self.model.load_state_dict(tensors)
        # PyTorch's momentum is that of Optax: the step is the learning rate times the sum of the
        # gradients with weights 1, momentum, momentum^2... `dampening` would change the weights.
        self.sgd = torch.optim.SGD(
            self.model.parameters(), lr=config.learning_rate, momentum=config.momentum
        )
        self.reorder = reorder

    def step(self, batch: Batch) -> float:
        if self.reorder is not None:
            batch = batch.reordered(self.reorder)
        images = torch.tensor(batch.images.transpose(0, 3, 1, 2), dtype=self.dtype)
        labels = torch.tensor(batch.labels, dtype=torch.int64)
        self.sgd.zero_grad()
        loss = functional.cross_entropy(self.model.train()(images), labels)
        loss.backward()
        self.sgd.step()
        return loss.item()

    def entries(self) -> dict[str, np.ndarray]:
        # Copy, as the next step changes the tensors in place.
        return {name: v.numpy().copy() for name, v in self.model.state_dict().items()}
