"""What XLA compiles for an H100 and for TPUs, counted without having one.

`python -m benchmarks.compiled tpu layers` prints one part of it, as JSON. It needs the compiler,
and the environment variables, of `benchmarks.targets`; `python -m benchmarks --only compiled` sets
those, and runs every part for the compilers that are installed.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo, targets
from benchmarks.resnet import NORMS, RESNET50, ResNet, training_step
from benchmarks.settings import Settings

LAYERS: Mapping[str, Callable[..., Any]] = {
    **NORMS,
    "Flax stable": partial(NORMS["Flax"], use_fast_variance=False),
}
EXAMPLES, PIXELS, FEATURES = 64, (28, 28), 256
# Images of a step, on the one GPU and on the four chips together.
BATCH = {"gpu": 64, "tpu": 128}
TOPOLOGIES = {4: "v5e:2x2", 256: "v5e:16x16", 512: "v5p:8x8x8"}
PACKAGES = ["jax", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"]


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


def layer_program(
    layer: str,
    case: Case,
    sharding: Sharding | None,
    sizes: tuple[int, ...] = (EXAMPLES, *PIXELS, FEATURES),
) -> jax.stages.Compiled:
    """Return one layer's training step, compiled for the devices of `sharding`.

    The cotangent is a product of `y` with a matrix over the features. It waits for all of `y`, as
    in a network; otherwise one reading of `x` would serve the forward and the backward pass.
    """
    examples, *pixels, features = sizes
    last = case.layout == "NHWC"
    shape = (examples, *pixels, features) if last else (examples, features, *pixels)
    mask_shape = (examples, *pixels, 1) if last else (examples, 1, *pixels)
    mix = "nhwc,cd->nhwd" if last else "nchw,cd->ndhw"
    norm = LAYERS[layer](use_running_average=False, axis=-1 if last else 1, dtype=case.dtype)

    def forward(variables, x, mask):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])

    def forward_backward(variables, x, mask, matrix):
        def of_inputs(params, x):
            return forward({**variables, "params": params}, x, mask)

        y, vjp, updates = jax.vjp(of_inputs, variables["params"], x, has_aux=True)
        return y, updates, vjp(jnp.einsum(mix, y, matrix))

    x = jax.ShapeDtypeStruct(shape, case.dtype)
    arguments = [jax.eval_shape(norm.init, jax.random.key(0), x), x, None]
    if case.masked:
        arguments[2] = jax.ShapeDtypeStruct(mask_shape, bool)
    if case.backward:
        arguments.append(jax.ShapeDtypeStruct((features, features), case.dtype))
    function = forward_backward if case.backward else forward
    return jax.jit(function).lower(*targets.placed(arguments, sharding)).compile()


def program_bytes(target: str, program: jax.stages.Compiled, counts: hlo.Counts) -> float:
    """Return the bytes that a program reads and writes; for a TPU, by the compiler's own count."""
    if target == "gpu":
        return counts.bytes
    analysis = program.cost_analysis()
    assert analysis is not None, "the TPU's compiler tells what its programs read and write"
    return analysis["bytes accessed"]


def temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    assert analysis is not None, "both compilers tell the memory of their programs"
    return analysis.temp_size_in_bytes


def layer_record(target: str, layer: str, case: Case, sharding: Sharding) -> dict[str, Any]:
    program = layer_program(layer, case, sharding)
    counts = hlo.count(program.as_text() or "")
    input_bytes = EXAMPLES * np.prod(PIXELS) * FEATURES * jnp.dtype(case.dtype).itemsize
    # The product reads `y` and writes the cotangent.
    passes = program_bytes(target, program, counts) / input_bytes - 2 * case.backward
    return {
        "layer": layer,
        **case._asdict(),
        "passes": passes,
        "loop_passes": counts.loop_bytes / input_bytes,
        "temporary_per_input_byte": temporary_bytes(program) / input_bytes,
        **{name: getattr(counts, name) for name in ("kernels", "loops", "branches")},
    }


def layers(target: str, quick: bool) -> list[dict[str, Any]]:
    """One layer on one device. Quick: what the tests bound, forward and backward without masks."""
    sharding = SingleDeviceSharding(targets.devices(target)[0])
    chosen = [case for case in cases() if not quick or (case.backward and not case.masked)]
    names = ["ours", "Flax"] if quick else list(LAYERS)
    return [layer_record(target, name, case, sharding) for case in chosen for name in names]


def network(target: str, quick: bool) -> list[dict[str, Any]]:
    """A training step of ResNet-50 in bfloat16, on an H100 or, under `jit`, on four TPU chips.

    Quick: one block a stage instead of three to six.
    """
    model = {**RESNET50, "blocks": (1, 1, 1, 1)} if quick else RESNET50
    return [network_record(target, name, model) for name in ("ours", "Flax")]


def network_record(target: str, layer: str, model: Mapping[str, Any]) -> dict[str, Any]:
    devices = targets.devices(target)
    mesh = Mesh(np.array(devices), ("data",))
    replicated, by_example = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    net = ResNet(LAYERS[layer], dtype=jnp.bfloat16, **model)
    images = jax.ShapeDtypeStruct((BATCH[target], 224, 224, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((BATCH[target],), jnp.int32)
    variables = jax.eval_shape(partial(net.init, train=True), jax.random.key(0), images)
    arguments = (
        targets.placed(variables, replicated),
        *targets.placed((images, labels), by_example),
    )
    program = jax.jit(training_step(net)).lower(*arguments).compile()
    text = program.as_text() or ""
    counts, collectives = hlo.count(text), hlo.collectives(text)
    return {
        "layer": layer,
        "devices": len(devices),
        "images": BATCH[target],
        "blocks": list(model["blocks"]),
        **counts._asdict(),
        "bytes": program_bytes(target, program, counts),
        "temporary_bytes": temporary_bytes(program),
        "collectives": len(collectives),
        "collective_bytes": sum(one.bytes for one in collectives),
    }


def sharded_layer(
    layer: str, features: int, dtype: str, under: str, devices: Sequence[Any]
) -> list[hlo.Collective]:
    """Return the collectives of one layer's training step, two examples on each device."""
    mesh = Mesh(np.array(devices), ("data",))
    norm = LAYERS[layer](
        use_running_average=False,
        dtype=dtype,
        axis_name="data" if under == "shard_map" else None,
    )

    def step(variables, x, dy):
        def of_inputs(params, x):
            return norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, vjp, updates = jax.vjp(of_inputs, variables["params"], x, has_aux=True)
        # It waits for `y`, as in a network.
        return y, updates, vjp(y * dy)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P("data"), P(), (P(), P("data")))}
    x = jax.ShapeDtypeStruct((2 * len(devices), 8, 8, features), dtype)
    variables = jax.eval_shape(norm.init, jax.random.key(0), x)
    shardings = jax.tree.map(partial(NamedSharding, mesh), specs["in_specs"])
    arguments = [targets.placed(*pair) for pair in zip((variables, x, x), shardings, strict=True)]
    if under == "shard_map":
        step = jax.shard_map(step, mesh=mesh, **specs)
    results = jax.tree.map(partial(NamedSharding, mesh), specs["out_specs"])
    program = jax.jit(step, out_shardings=results).lower(*arguments).compile()
    return hlo.collectives(program.as_text() or "")


def collectives(target: str, quick: bool) -> list[dict[str, Any]]:
    """The batch norms of a ResNet-50 on many TPU chips, each compiled alone, forward and backward.

    Quick: 64 features on four chips.
    """
    from benchmarks.scaling import RESNET50 as features_of_layers

    if target == "gpu":
        return []
    layers_of = Counter([64] if quick else features_of_layers)
    chips = {4: TOPOLOGIES[4]} if quick else TOPOLOGIES
    records = []
    for count, topology in chips.items():
        devices = targets.devices(target, topology)
        for under, dtype, layer in itertools.product(
            ("jit", "shard_map"), ("float32", "bfloat16"), ("ours", "Flax")
        ):
            found = {
                features: sharded_layer(layer, features, dtype, under, devices)
                for features in layers_of
            }
            each = [
                {
                    "features": features,
                    "layers": layers_of[features],
                    "kinds": Counter(one.kind for one in found[features]),
                    "bytes": sum(one.bytes for one in found[features]),
                }
                for features in layers_of
            ]
            records.append(
                {
                    **{"chips": count, "topology": topology, "under": under},
                    **{"dtype": dtype, "layer": layer, "each": each},
                    "collectives": sum(one["layers"] * one["kinds"].total() for one in each),
                    "bytes": sum(one["layers"] * one["bytes"] for one in each),
                }
            )
    return records


PARTS: Mapping[str, Callable[[str, bool], list[dict[str, Any]]]] = {
    "layers": layers,
    "network": network,
    "collectives": collectives,
}


def part(target: str, name: str, quick: bool = False) -> list[dict[str, Any]]:
    """Return a part, from a process with the environment that the compiler needs.

    Raises:
      RuntimeError: the process failed.
    """
    options = ["--quick"] if quick else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", target, name, *options],
        capture_output=True,
        text=True,
        env=targets.environment(target),
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        raise RuntimeError(f"{name} for the {target}: {done.stderr[-4000:]}")
    return json.loads(done.stdout)


def versions() -> dict[str, str]:
    installed = {one.name: one.version for one in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def measure(settings: Settings) -> dict[str, Any]:
    """Every part for each compiler at hand, and what other environments left in the folder."""
    found: dict[str, Any] = {}
    installed = [target for target in targets.TARGETS if targets.is_installed(target)]
    for target, name in settings.track([*itertools.product(installed, PARTS)], "compiled"):
        result = found.setdefault(target, {"quick": settings.quick, "versions": versions()})
        result[name] = part(target, name, settings.quick)
    for target in targets.TARGETS if settings.out else []:
        path = settings.out / f"compiled-{target}.json"
        if target in found:
            path.write_text(json.dumps(found[target], indent=1) + "\n")
        elif path.exists():
            found[target] = json.loads(path.read_text())
    missing = {target: targets.missing(target) for target in targets.TARGETS if target not in found}
    return {"targets": found, "missing": missing}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    print(json.dumps(PARTS[given.part](given.target, given.quick)))
