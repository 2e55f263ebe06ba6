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
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.torch_model import batch_norms

STEPS = 5
LEARNING_RATE = 0.01


class Photographs(NamedTuple):
    """What to learn: images, (N, height, width, 3), and their labels, (N,)."""

    images: np.ndarray
    labels: np.ndarray


def train_flax(
    model: EfficientNetLite0, variables: Mapping[str, Any], batch: Photographs, frozen: bool
) -> tuple[list[float], dict[str, Any]]:
    """Train by SGD, and return the loss before each step and the variables after the last."""
    apply = override(model.apply, {"**": {"frozen": frozen}})
    sgd = optax.sgd(LEARNING_RATE)

    @jax.jit
    def step(params: Any, batch_stats: Any, batch: Photographs) -> Any:
        def loss(params: Any) -> Any:
            before = {"params": params, "batch_stats": batch_stats}
            logits, updates = apply(before, batch.images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), updates["batch_stats"]

        (value, batch_stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = sgd.update(gradients, sgd.init(params))
        return optax.apply_updates(params, updates), batch_stats_after, value

    params, batch_stats = variables["params"], variables["batch_stats"]
    losses = []
    for _ in range(STEPS):
        params, batch_stats, value = step(params, batch_stats, batch)
        losses.append(float(value))
    return losses, {"params": params, "batch_stats": batch_stats}


def train_torch(
    model: torch.nn.Module, batch: Photographs, frozen: bool
) -> tuple[list[float], torch.nn.Module]:
    """Train a copy of the network by SGD, and return the loss before each step, and the copy."""
    inputs, labels = torch.tensor(batch.images.transpose(0, 3, 1, 2)), torch.tensor(batch.labels)
    model = copy.deepcopy(model).train()
    if frozen:
        for norm in batch_norms(model).values():
            norm.eval()
    sgd = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(inputs), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, model
