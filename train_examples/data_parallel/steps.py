"""The training step on many devices, by each of JAX's three ways to map it over them.

Each step takes a replicated state and a batch that is spread over a mesh, and returns what one
device would return for the whole batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train_examples.common.model import ConvNet
from train_examples.common.training import Tree, forward
from train_examples.data_parallel.batches import AXIS, Batch
from train_examples.digits.train import Metrics, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Total = Callable[[Any], Any]


def train_step(
    state: TrainState, batch: Batch, apply_fn: Any, total: Total, total_gradient: Total
) -> tuple[TrainState, Metrics]:
    """Compute one device's part of a step of the optimizer.

    Devices may hold unequal numbers of images that count. So each device divides its sum of losses
    by the number on all devices, and the gradients are summed; the mean of the devices' means would
    differ.

    Args:
      state: the state, the same on every device.
      batch: this device's share of the batch.
      apply_fn: applies the network. Its normalizations share their statistics between devices.
      total: sums over devices.
      total_gradient: sums gradients over devices, if JAX does not do that by itself.

    Returns:
      The next state and the metrics of the whole batch, the same on every device.
    """
    mask = jnp.asarray(batch.mask)
    count = total(jnp.sum(mask))

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        losses, rest = forward(
            params, state.batch_stats, apply_fn, batch.images, batch.labels, mask
        )
        return jnp.sum(losses, where=mask) / count, rest

    (loss, (logits, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    state = state.apply_gradients(grads=total_gradient(gradient), batch_stats=batch_stats)
    correct = jnp.sum((jnp.argmax(logits, -1) == batch.labels) & mask)
    return state, Metrics(total(loss), total(correct) / count)


def by_shard_map(model: ConvNet, mesh: Mesh) -> Step:
    """Map the step by `shard_map`, with collectives over the named axis."""
    each = partial(
        train_step,
        apply_fn=named(model).apply,
        total=partial(lax.psum, axis_name=AXIS),
        # `shard_map` knows that the parameters are replicated, and sums their gradients.
        total_gradient=unchanged,
    )
    return jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()))


def by_pmap(model: ConvNet, mesh: Mesh) -> Step:
    """Map the step by `pmap` over a process's own devices; gradients are summed by hand."""
    total = partial(lax.psum, axis_name=AXIS)
    each = jax.pmap(
        partial(train_step, apply_fn=named(model).apply, total=total, total_gradient=total),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,  # pyright: ignore[reportArgumentType]  (documented, but not annotated)
        devices=list(mesh.devices.flat),
    )
    local_devices = mesh.local_mesh.size

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # `pmap` takes and returns arrays of this process alone, with an axis for its devices.
        state = multihost_utils.global_array_to_host_local_array(state, mesh, P())
        batch = multihost_utils.global_array_to_host_local_array(batch, mesh, P(AXIS))
        batch = jax.tree.map(lambda v: v.reshape(local_devices, -1, *v.shape[1:]), batch)
        return multihost_utils.host_local_array_to_global_array(each(state, batch), mesh, P())

    return step


def by_jit(model: ConvNet, mesh: Mesh) -> Step:
    """Compile the program of one device by `jit`, which splits it as the batch is split."""
    whole = partial(train_step, apply_fn=model.apply, total=unchanged, total_gradient=unchanged)
    return jax.jit(whole, out_shardings=NamedSharding(mesh, P()))


STEPS: dict[str, Callable[[ConvNet, Mesh], Step]] = {
    "shard_map": by_shard_map,
    "pmap": by_pmap,
    "jit": by_jit,
}


def named(model: ConvNet) -> ConvNet:
    """Return `model` with normalizations that share statistics over the mesh's axis."""
    return model.clone(norm=partial(model.norm, axis_name=AXIS))


def unchanged(value: Any) -> Any:
    """Return `value`: the sum over devices where JAX computes it by itself."""
    return value
