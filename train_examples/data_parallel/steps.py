"""The training step on many devices, in JAX's three ways of mapping it over them.

Each takes a replicated state and a batch that is spread over a mesh, and gives what one device
would give with the whole batch.
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

from train_examples.data_parallel.batches import AXIS, Batch
from train_examples.digits.model import ConvNet
from train_examples.digits.train import Metrics, TrainState, Tree, forward

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Total = Callable[[Any], Any]


def train_step(
    state: TrainState, batch: Batch, apply_fn: Any, total: Total, total_gradient: Total
) -> tuple[TrainState, Metrics]:
    """One device's part of a step of the optimizer.

    Devices may hold unequal numbers of images that count. So each divides its sum of losses by the
    number on all devices, and the gradient is the sum of theirs; the mean of the devices' means
    would be another number.

    Args:
      state: the state, the same on every device.
      batch: this device's share of the batch.
      apply_fn: applies the network. Its normalizations share their statistics between devices.
      total: sums over devices.
      total_gradient: sums gradients over devices, where JAX does not do that by itself.
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
    """`shard_map`: each device's part, with collectives by the axis's name."""
    each = partial(
        train_step,
        apply_fn=named(model).apply,
        total=partial(lax.psum, axis_name=AXIS),
        # The parameters are known to be replicated, so the transpose sums their gradients.
        total_gradient=unchanged,
    )
    return jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()))


def by_pmap(model: ConvNet, mesh: Mesh) -> Step:
    """`pmap`: as `shard_map`, but of a process's own devices, and gradients are summed by hand."""
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
        # `pmap` takes and gives what lies on a process's own devices, in an axis of its own.
        state = multihost_utils.global_array_to_host_local_array(state, mesh, P())
        batch = multihost_utils.global_array_to_host_local_array(batch, mesh, P(AXIS))
        batch = jax.tree.map(lambda v: v.reshape(local_devices, -1, *v.shape[1:]), batch)
        return multihost_utils.host_local_array_to_global_array(each(state, batch), mesh, P())

    return step


def by_jit(model: ConvNet, mesh: Mesh) -> Step:
    """`jit`: the program of one device; its compiler splits it as the batch is split."""
    whole = partial(train_step, apply_fn=model.apply, total=unchanged, total_gradient=unchanged)
    return jax.jit(whole, out_shardings=NamedSharding(mesh, P()))


STEPS: dict[str, Callable[[ConvNet, Mesh], Step]] = {
    "shard_map": by_shard_map,
    "pmap": by_pmap,
    "jit": by_jit,
}


def named(model: ConvNet) -> ConvNet:
    """`model`, whose normalizations share their statistics over the mesh's axis."""
    return model.clone(norm=partial(model.norm, axis_name=AXIS))


def unchanged(value: Any) -> Any:
    return value
