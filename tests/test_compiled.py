"""XLA compiles a training step without loops or branches, and to the promised bytes.

A compiler for GPUs or TPUs runs without the device. Where none is installed, the program for the
CPU keeps what it can.
"""

import functools
import json
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import compiled, hlo, plots, programs, report, resnet, scaling, targets
from benchmarks.programs import Case
from benchmarks.settings import Settings

pytestmark = pytest.mark.usefixtures("without_compilation_cache")

# Bytes over those of Flax's default layer, of one layer and of a network. Counts do not vary from
# run to run; these are what the project promises.
LAYER_BOUND = {"gpu": 0.97, "tpu": 1.03}
NETWORK_BOUND = {"gpu": 0.97, "tpu": 1.00}


@pytest.fixture(params=targets.TARGETS)
def target(request):
    if not targets.is_installed(request.param):
        pytest.skip(targets.missing(request.param))
    return request.param


@functools.cache
def quick(target: str, name: str) -> list[dict]:
    return compiled.part(target, name, quick=True)


def pairs(records: list[dict], *keys: str) -> dict[tuple, tuple[dict, dict]]:
    """Return our record and Flax's of each case."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for one in records:
        by_case.setdefault(tuple(one[key] for key in keys), {})[one["layer"]] = one
    return {case: (found["ours"], found["Flax"]) for case, found in by_case.items()}


def test_a_layer_has_no_loop_and_no_branch(target):
    ours = [one for one in quick(target, "layers") if one["layer"] == "ours"]
    assert {one["dtype"] for one in ours} == {"float32", "bfloat16"}
    assert [one for one in ours if one["loops"] or one["branches"]] == []


def test_a_layer_moves_no_more_bytes_than_promised(target):
    found = pairs(quick(target, "layers"), "dtype", "layout")
    ratios = {case: ours["passes"] / flax["passes"] for case, (ours, flax) in found.items()}
    assert len(ratios) == 4
    assert {case: r for case, r in ratios.items() if r > LAYER_BOUND[target]} == {}
    # No count can be below the floor: x read for the moments and for y, and y written; then dy and
    # x read for the sums and for dx, and dx written.
    assert all(one["passes"] >= 8 for one in quick(target, "layers"))


def test_a_network_moves_no_more_bytes_than_promised(target):
    ours, flax = quick(target, "network")
    assert (ours["layer"], flax["layer"]) == ("ours", "Flax")
    assert (ours["loops"], ours["branches"]) == (0, 0)
    assert ours["bytes"] / flax["bytes"] <= NETWORK_BOUND[target]
    assert ours["collectives"] <= flax["collectives"]


def test_collectives_of_a_layer_on_tpus():
    """In float32 under `jit`, the mean of a sample, and of what it left, come before the rest."""
    if not targets.is_installed("tpu"):
        pytest.skip(targets.missing("tpu"))
    found = pairs(quick("tpu", "collectives"), "under", "dtype")
    assert len(found) == 4
    for case, (ours, flax) in found.items():
        allowed = flax["collectives"] + 2 * (case == ("jit", "float32"))
        assert ours["collectives"] <= allowed, case


def cpu_program(layer: str, case: Case) -> tuple[hlo.Counts, float, float]:
    """Return counts, and the bytes moved and of temporaries relative to the input's."""
    sizes = (32, 16, 16, 64)
    program = programs.layer(layer, case, sizes, SingleDeviceSharding(jax.devices("cpu")[0]))
    counts = hlo.count(program.as_text())
    input_bytes = math.prod(sizes) * jnp.dtype(case.dtype).itemsize
    temporaries = program.memory_analysis().temp_size_in_bytes / input_bytes
    return counts, counts.bytes / input_bytes, temporaries


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_on_a_cpu_reads_three_times_and_writes_once(dtype, layout):
    """The mean, the variance and `y` read `x`; no array of its size lies between them."""
    counts, passes, temporaries = cpu_program("ours", Case(dtype, layout, False, False))
    assert (counts.loops, counts.branches) == (1, 0)
    # A feature's numbers, a few at a time, are a thousandth of the input's, a pixel's 1 / 8192.
    assert 4 <= passes < 4.1
    assert temporaries < 0.1


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_backward_on_a_cpu_keeps_no_array_but_the_cotangent(layout):
    counts, _, temporaries = cpu_program("ours", Case("float32", layout, False, True))
    assert (counts.loops, counts.branches) == (1, 0)
    assert temporaries < 1.1


# Flax's layer promotes dtypes.
@pytest.mark.usefixtures("standard_promotion")
def test_a_whole_array_between_two_passes_would_be_noticed():
    """Flax's layer widens a bfloat16 input to float32 and writes that out."""
    counts, passes, temporaries = cpu_program("Flax", Case("bfloat16", "NHWC", False, False))
    assert counts.loops == 0
    assert passes > 5 and temporaries > 1


def test_resnet50_is_the_published_one():
    net = resnet.ResNet(resnet.NORMS["Flax"], **resnet.RESNET50)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), images)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == 25_557_032
    means = [leaf for leaf in jax.tree.leaves(variables["batch_stats"])][::2]
    assert Counter(leaf.size for leaf in means) == Counter(scaling.RESNET50)


def record_of_a_layer(name: str, passes: float) -> dict:
    case = Case("float32", "NHWC", False, True)
    counts = {"kernels": 7, "loops": 0, "branches": 0}
    return {
        **{"layer": name, **case._asdict(), **counts},
        **{"passes": passes, "loop_passes": 0, "temporary_per_input_byte": 0.5},
    }


def record_of_a_network(name: str, gigabytes: float) -> dict:
    return {
        **{"layer": name, "devices": 4, "images": 128, "blocks": [3, 4, 6, 3], "kernels": 900},
        **{"loops": 0, "branches": 0, "loop_bytes": 0, "bytes": 1e9 * gigabytes},
        **{"temporary_bytes": 3e9, "collectives": 99, "collective_bytes": 51_200_000},
    }


def record_of_collectives(name: str, bytes_: int) -> dict:
    kinds = {"all-gather": 1, "all-reduce": 1}
    each = [
        {"features": features, "layers": 2, "kinds": kinds, "bytes": features * bytes_}
        for features in (64, 128)
    ]
    return {
        **{"chips": 256, "topology": "v5e:16x16", "under": "jit", "dtype": "float32"},
        **{"layer": name, "each": each, "collectives": 8, "bytes": 2 * 192 * bytes_},
    }


PARTS = {
    "layers": [record_of_a_layer("ours", 8.0), record_of_a_layer("Flax", 10.0)],
    "network": [record_of_a_network("ours", 24.3), record_of_a_network("Flax", 27.0)],
    "collectives": [record_of_collectives("ours", 1000), record_of_collectives("Flax", 20)],
}


def test_two_environments_fill_one_report(monkeypatch, tmp_path):
    """Each run measures for the installed compilers, and keeps the results of other runs."""

    def run(*installed: str) -> dict:
        monkeypatch.setattr(targets, "is_installed", lambda target: target in installed)
        return compiled.measure(Settings(quick=True, out=tmp_path))

    monkeypatch.setattr(compiled, "part", lambda target, name, quick: PARTS[name])
    assert run() == {
        "targets": {},
        "missing": {target: targets.missing(target) for target in targets.TARGETS},
    }
    first = run("tpu")
    assert list(first["targets"]) == ["tpu"] and list(first["missing"]) == ["gpu"]
    data = run("gpu")
    assert list(data["targets"]) == ["gpu", "tpu"] and data["missing"] == {}
    assert data["targets"]["tpu"] == first["targets"]["tpu"]
    assert json.loads((tmp_path / "compiled-gpu.json").read_text()) == data["targets"]["gpu"]
    plots.compiled(data, tmp_path / "compiled.png")
    assert (tmp_path / "compiled.png").read_bytes().startswith(b"\x89PNG")


def test_the_report(monkeypatch):
    monkeypatch.setattr(targets, "is_installed", lambda target: target == "tpu")
    monkeypatch.setattr(compiled, "part", lambda target, name, quick: PARTS[name])
    text = report.compiled(compiled.measure(Settings()))
    rows = [
        "| forward + backward | float32 | NHWC | no | 8.00 | 10.00 | 0.80 | 7 / 7 | 0 / 0 "
        "| 0.50 / 0.50 |",
        "ResNet-50, 128 images of 224 x 224 pixels, bfloat16, over 4 chips under `jit`. Bytes and "
        "temporaries are one device's.",
        "| ours | 24.30 GB | 0.900 | 900 | 0 | 0 | 3.00 GB | 99 | 51.2 MB |",
        "| 256 (v5e:16x16) | jit | float32 | ours | 1 all-gather, 1 all-reduce | 64,000 | 128,000 "
        "| 8 | 0.384 MB |",
        f"Left out: {targets.missing('gpu')}.",
    ]
    for row in rows:
        assert row in text.splitlines()


def test_what_to_install():
    assert targets.missing("tpu") == (
        "nothing is compiled for the TPU v5e: into an environment of its own that has jax 0.10.2, "
        'pip install -e ".[compile-tpu]"'
    )
    assert targets.missing("gpu") == (
        "nothing is compiled for the NVIDIA H100: into an environment of its own that has jax "
        "0.10.2, pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 "
        "nvidia-cuda-nvcc-cu12==12.9.86"
    )


def test_a_failed_compilation_says_why():
    with pytest.raises(RuntimeError) as error:
        compiled.part("gpu", "nothing")
    first, *_, last = str(error.value).splitlines()
    assert first == "nothing, compiled for the gpu, failed:"
    assert "argument part: invalid choice: 'nothing'" in last
