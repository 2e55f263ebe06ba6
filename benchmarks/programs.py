"""Programs that are compiled for machines that are not present: a layer, a network's step."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from benchmarks.resnet import NORMS, ResNet, training_step
from benchmarks.targets import placed

LAYERS: Mapping[str, Callable[..., Any]] = {
    **NORMS,
    "Flax stable": partial(NORMS["Flax"], use_fast_variance=False),
}


class Case(NamedTuple):
    dtype: str
    layout: str  # "NHWC" or "NCHW"
    masked: bool
    backward: bool  # whether the backward pass follows the forward pass


def cases() -> list[Case]:
    choices = itertools.product(
        ("float32", "bfloat16"), ("NHWC", "NCHW"), (False, True), (False, True)
    )
    return [Case(*choice) for choice in choices]


def layer(
    name: str, case: Case, sizes: tuple[int, int, int, int], sharding: Sharding
) -> jax.stages.Compiled:
    """Return one layer's training step, compiled for the devices of `sharding`.

    The cotangent is a product of `y` with a matrix over the features. It waits for all of `y`, as
    in a network; otherwise one read of `x` would serve both the forward and the backward pass.

    Args:
      name: one of `LAYERS`.
      case: what the step is.
      sizes: examples, rows, columns and features.
      sharding: where the arguments are placed.
    """
    examples, rows, columns, features = sizes
    last = case.layout == "NHWC"
    shape = (examples, rows, columns, features) if last else (examples, features, rows, columns)
    mask_shape = (examples, rows, columns, 1) if last else (examples, 1, rows, columns)
    product = "nhwc,cd->nhwd" if last else "nchw,cd->ndhw"
    norm = LAYERS[name](use_running_average=False, axis=-1 if last else 1, dtype=case.dtype)

    def forward(variables, x, mask):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])

    def forward_backward(variables, x, mask, matrix):
        def of_inputs(params, x):
            return forward({**variables, "params": params}, x, mask)

        y, vjp, updates = jax.vjp(of_inputs, variables["params"], x, has_aux=True)
        return y, updates, vjp(jnp.einsum(product, y, matrix))

    x = jax.ShapeDtypeStruct(shape, case.dtype)
    mask = jax.ShapeDtypeStruct(mask_shape, bool) if case.masked else None
    arguments = [jax.eval_shape(norm.init, jax.random.key(0), x), x, mask]
    if case.backward:
        arguments.append(jax.ShapeDtypeStruct((features, features), case.dtype))
    function = forward_backward if case.backward else forward
    return jax.jit(function).lower(*placed(arguments, sharding)).compile()


def network(
    name: str, model: Mapping[str, Any], images: int, devices: Sequence[Any]
) -> jax.stages.Compiled:
    """Return a ResNet's training step in bfloat16, under `jit`, with the images split over devices.

    Args:
      name: one of `LAYERS`.
      model: arguments of `ResNet`.
      images: how many images of 224 x 224 pixels there are, on all devices together.
      devices: what to compile for.
    """
    mesh = Mesh(np.array(devices), ("data",))
    net = ResNet(LAYERS[name], dtype=jnp.bfloat16, **model)
    batch = (
        jax.ShapeDtypeStruct((images, 224, 224, 3), jnp.bfloat16),
        jax.ShapeDtypeStruct((images,), jnp.int32),
    )
    variables = jax.eval_shape(partial(net.init, train=True), jax.random.key(0), batch[0])
    variables = placed(variables, NamedSharding(mesh, P()))
    batch = placed(batch, NamedSharding(mesh, P("data")))
    return jax.jit(training_step(net)).lower(variables, *batch).compile()


def sharded_layer(
    name: str, features: int, dtype: str, under: str, devices: Sequence[Any]
) -> jax.stages.Compiled:
    """Return one layer's training step on two examples per device, which share their statistics.

    Args:
      name: one of `LAYERS`.
      features: how many there are, on the last axis.
      dtype: that of the input.
      under: "jit", or "shard_map", for which the layer is given the name of the axis.
      devices: what to compile for.
    """
    mesh = Mesh(np.array(devices), ("data",))
    axis_name = "data" if under == "shard_map" else None
    norm = LAYERS[name](use_running_average=False, dtype=dtype, axis_name=axis_name)

    def step(variables, x, dy):
        def of_inputs(params, x):
            return norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, vjp, updates = jax.vjp(of_inputs, variables["params"], x, has_aux=True)
        return y, updates, vjp(y * dy)  # the cotangent waits for `y`

    replicated, by_example = P(), P("data")
    in_specs = (replicated, by_example, by_example)
    out_specs = (by_example, replicated, (replicated, by_example))
    if under == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    x = jax.ShapeDtypeStruct((2 * len(devices), 8, 8, features), dtype)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    given = zip((variables, x, x), in_specs, strict=True)
    arguments = [placed(tree, NamedSharding(mesh, spec)) for tree, spec in given]
    out_shardings = jax.tree.map(partial(NamedSharding, mesh), out_specs)
    return jax.jit(step, out_shardings=out_shardings).lower(*arguments).compile()
