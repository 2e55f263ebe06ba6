"""Count what XLA compiles for an H100 and for TPUs, without having one.

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
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks import hlo, programs, targets
from benchmarks.programs import Case
from benchmarks.resnet import RESNET50
from benchmarks.settings import Settings

SIZES = (64, 28, 28, 256)  # examples, rows, columns and features of a layer
# Images of a step, on the one GPU and on the four chips together.
IMAGES = {"gpu": 64, "tpu": 128}
TOPOLOGIES = {4: "v5e:2x2", 256: "v5e:16x16", 512: "v5p:8x8x8"}
PACKAGES = ["jax", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"]
Records = list[dict[str, Any]]


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


def layers(target: str, quick: bool) -> Records:
    """Count one layer on one device. With `quick`, only forward and backward without masks."""
    device = targets.devices(target)[0]
    chosen = [one for one in programs.cases() if not quick or (one.backward and not one.masked)]
    names = ["ours", "Flax"] if quick else list(programs.LAYERS)
    return [layer(target, name, case, device) for case in chosen for name in names]


def layer(target: str, name: str, case: Case, device: Any) -> dict[str, Any]:
    program = programs.layer(name, case, SIZES, SingleDeviceSharding(device))
    counts = hlo.count(program.as_text() or "")
    input_bytes = int(np.prod(SIZES)) * jnp.dtype(case.dtype).itemsize
    # The loss, a product, reads `y` and writes the cotangent.
    passes = program_bytes(target, program, counts) / input_bytes - 2 * case.backward
    return {
        "layer": name,
        **case._asdict(),
        "passes": passes,
        "loop_passes": counts.loop_bytes / input_bytes,
        "temporary_per_input_byte": temporary_bytes(program) / input_bytes,
        **{key: getattr(counts, key) for key in ("kernels", "loops", "branches")},
    }


def network(target: str, quick: bool) -> Records:
    """Count a training step of ResNet-50 in bfloat16, on one H100 or, under `jit`, four TPU chips.

    Quick: one block a stage instead of three to six.
    """
    model = {**RESNET50, "blocks": (1, 1, 1, 1)} if quick else RESNET50
    devices, images = targets.devices(target), IMAGES[target]
    records = []
    for name in ("ours", "Flax"):
        program = programs.network(name, model, images, devices)
        text = program.as_text() or ""
        counts, collectives = hlo.count(text), hlo.collectives(text)
        records.append(
            {
                **{"layer": name, "devices": len(devices), "images": images},
                "blocks": list(model["blocks"]),
                **counts._asdict(),
                "bytes": program_bytes(target, program, counts),
                "temporary_bytes": temporary_bytes(program),
                "collectives": len(collectives),
                "collective_bytes": sum(one.bytes for one in collectives),
            }
        )
    return records


def collectives(target: str, quick: bool) -> Records:
    """Count the batch norms of a ResNet-50 on many TPU chips, each compiled by itself.

    Quick: 64 features on four chips.
    """
    from benchmarks.scaling import RESNET50 as features_of_layers

    if target == "gpu":
        return []
    layers_of = Counter([64] if quick else features_of_layers)
    choices = itertools.product(
        [4] if quick else TOPOLOGIES,
        ("jit", "shard_map"),
        ("float32", "bfloat16"),
        ("ours", "Flax"),
    )
    return [collectives_of_layers(layers_of, *choice) for choice in choices]


def collectives_of_layers(
    layers_of: Mapping[int, int], chips: int, under: str, dtype: str, name: str
) -> dict[str, Any]:
    """Return the counts of the layers of each number of features, and of all layers together."""
    devices = targets.devices("tpu", TOPOLOGIES[chips])
    each = []
    for features, count in sorted(layers_of.items()):
        program = programs.sharded_layer(name, features, dtype, under, devices)
        found = hlo.collectives(program.as_text() or "")
        each.append(
            {
                **{"features": features, "layers": count},
                "kinds": Counter(one.kind for one in found),
                "bytes": sum(one.bytes for one in found),
            }
        )
    return {
        **{"chips": chips, "topology": TOPOLOGIES[chips], "under": under},
        **{"dtype": dtype, "layer": name, "each": each},
        "collectives": sum(one["layers"] * one["kinds"].total() for one in each),
        "bytes": sum(one["layers"] * one["bytes"] for one in each),
    }


PARTS: Mapping[str, Callable[[str, bool], Records]] = {
    "layers": layers,
    "network": network,
    "collectives": collectives,
}


def part(target: str, name: str, quick: bool = False) -> Records:
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
        raise RuntimeError(f"{name}, compiled for the {target}, failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Count every part for each installed compiler, and add results of other environments."""
    found: dict[str, Any] = {}
    installed = [target for target in targets.TARGETS if targets.is_installed(target)]
    for target, name in settings.track([*itertools.product(installed, PARTS)], "compiled"):
        result = found.setdefault(target, {"quick": settings.quick, "versions": versions()})
        result[name] = part(target, name, settings.quick)
    if settings.out:
        found = share(found, settings.out)
    missing = {target: targets.missing(target) for target in targets.TARGETS if target not in found}
    return {"targets": found, "missing": missing}


def share(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a file for each target that was found, read those of the others, and return all."""
    everything = {}
    for target in targets.TARGETS:
        path = folder / f"compiled-{target}.json"
        if target in found:
            path.write_text(json.dumps(found[target], indent=1) + "\n")
        if path.exists():
            everything[target] = json.loads(path.read_text())
    return everything


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="less of it, as each part says")
    given = parser.parse_args(argv)
    print(json.dumps(PARTS[given.part](given.target, given.quick)))


if __name__ == "__main__":
    main(sys.argv[1:])
