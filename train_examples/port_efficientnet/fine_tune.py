"""A few steps of training in both frameworks, with frozen or live batch norms."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from torch.nn import functional

from jaxbn.linen import override
from train_examples.port_efficientnet.compare import distance
from train_examples.port_efficientnet.convert import to_flax
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.torch_model import batch_norms

STEPS = 5
LEARNING_RATE = 0.01


class Trained(NamedTuple):
    """The loss before each step, and the variables after the last, in Flax's layout."""

    losses: list[float]
    variables: Mapping[str, Any]


def train_flax(
    variables: Mapping[str, Any], images: np.ndarray, labels: np.ndarray, frozen: bool
) -> Trained:
    """Train the Flax network by SGD. The variables and images have the dtype of the training."""
    apply = override(EfficientNetLite0().apply, {"**": {"frozen": frozen}})
    sgd = optax.sgd(LEARNING_RATE)

    @jax.jit
    def step(params: Any, batch_stats: Any) -> Any:
        def loss(params: Any) -> Any:
            all_variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = apply(all_variables, images, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (value, batch_stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = sgd.update(gradients, sgd.init(params))
        return optax.apply_updates(params, updates), batch_stats_after, value

    params, batch_stats = variables["params"], variables["batch_stats"]
    losses = []
    for _ in range(STEPS):
        params, batch_stats, value = step(params, batch_stats)
        losses.append(float(value))
    return Trained(losses, {"params": params, "batch_stats": batch_stats})


def train_torch(
    model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, frozen: bool
) -> Trained:
    """Train a copy of the PyTorch network by SGD, in the dtype of the images."""
    inputs, targets = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(labels)
    model = copy.deepcopy(model).to(inputs.dtype).train()
    if frozen:
        for norm in batch_norms(model).values():
            norm.eval()
    sgd = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(inputs), targets)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return Trained(losses, to_flax(model.state_dict()))


def difference(theirs: Trained, ours: Trained) -> float:
    """Return the largest difference of variables, relative to each one's largest value."""
    differences = jax.tree.map(
        lambda a, b: distance(np.asarray(a), np.asarray(b)), ours.variables, theirs.variables
    )
    return float(np.max(jax.tree.leaves(differences)))
