"""Machines that programs are compiled for, without being present: an H100, and TPUs."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What XLA needs to know about a GPU, with the values of an H100 (XLA's GpuTargetConfigProto).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A compiler: its module, how to install it, and the environment that it needs."""

    title: str
    module: str
    install: str
    environment: Mapping[str, str]


# JAX must not look for the device itself, XLA must not try kernels out on it, and a process that
# only compiles need not wait for another that does.
TARGETS: Mapping[str, Target] = {
    "gpu": Target(
        "NVIDIA H100",
        "jax_plugins.xla_cuda12",
        "pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 "
        "nvidia-cuda-nvcc-cu12==12.9.86",
        {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    ),
    "tpu": Target(
        "TPU v5e",
        "libtpu",
        'pip install -e ".[compile-tpu]"',
        {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        },
    ),
}


def is_installed(target: str) -> bool:
    """Return whether this environment has the compiler for a target."""
    try:
        return importlib.util.find_spec(TARGETS[target].module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def missing(target: str) -> str:
    """Return the line that says how to install the compiler for a target."""
    return (
        f"nothing is compiled for the {TARGETS[target].title}: into an environment of its own that "
        f"has jax 0.10.2, {TARGETS[target].install}"
    )


def environment(target: str) -> dict[str, str]:
    """Return the environment variables that a process must start with to compile for a target."""
    return {**os.environ, **TARGETS[target].environment}


def devices(target: str, topology: str | None = None) -> list[Any]:
    """Return devices to compile for: an H100, or the chips of a TPU topology such as "v5e:2x2"."""
    if target == "gpu":
        found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology or "v5e:2x2")
    return list(found.devices)


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Return the shapes and dtypes of a tree's leaves, as arguments that are on given devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
