"""Count, measure on CPU devices and model what statistics across devices cost.

`python -m benchmarks.scaling` prints the tables of docs/scaling.md and writes its picture.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks.collectives import of_batch_norm
from benchmarks.timing import turn_by_turn
from jaxbn._palette import COLORS, DPI

# The features of ResNet-50's 53 batch norms (He et al., 2015, table 1): the stem, then in each
# stage the projection of the first block and the three layers of every block.
STAGES = [(64, 256, 3), (128, 512, 4), (256, 1024, 6), (512, 2048, 3)]
RESNET50 = [64] + [
    features
    for narrow, wide, blocks in STAGES
    for features in [wide, *[narrow, narrow, wide] * blocks]
]

Seconds = Callable[[int, int, float, float], float]
DEVICES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
GROUPS = [16, 64]


def table_bytes(devices: int, features: int) -> int:
    """Return the bytes of every device's count, mean (two numbers) and variance, in float32."""
    return 4 * 4 * devices * features


def sums_bytes(features: int) -> int:
    """Return the bytes of the count and the sums of the values and of their squares, in float32."""
    return 3 * 4 * features


def backward_bytes(features: int) -> int:
    """Return the bytes of the sums of the cotangent and of it times the input, in float32."""
    return 2 * 4 * features


def all_gather_seconds(bytes_: float, devices: int, latency: float, bandwidth: float) -> float:
    """Return the time of recursive doubling: log2 D rounds, (D - 1) / D of the result's bytes.

    Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH",
    2005, section 4.1.
    """
    return latency * np.log2(devices) + (devices - 1) / devices * bytes_ / bandwidth


def all_reduce_seconds(bytes_: float, devices: int, latency: float, bandwidth: float) -> float:
    """Return the time of recursive halving and doubling, each as long as an all-gather.

    The same paper, section 4.5.
    """
    return 2 * all_gather_seconds(bytes_, devices, latency, bandwidth)


def table_seconds(devices: int, features: int, latency: float, bandwidth: float) -> float:
    """Return the forward time in float32: an all-gather of the moments of every device."""
    return all_gather_seconds(table_bytes(devices, features), devices, latency, bandwidth)


def sums_seconds(devices: int, features: int, latency: float, bandwidth: float) -> float:
    """Return the forward time in half precision: an all-reduce of sums about zero."""
    return all_reduce_seconds(sums_bytes(features), devices, latency, bandwidth)


def step_seconds(devices: int, latency: float, bandwidth: float, forward: Seconds) -> float:
    """Return the seconds that a step of ResNet-50 waits for its batch norms."""
    return sum(
        forward(devices, features, latency, bandwidth)
        + all_reduce_seconds(backward_bytes(features), devices, latency, bandwidth)
        for features in RESNET50
    )


def print_counted() -> None:
    print("Counted in the compiled program, 64 features:\n")
    print("| devices | type | forward | bytes | backward | bytes |\n|---|---|---|---|---|---|")
    for devices in (2, 4, 8):
        for dtype in ("float32", "bfloat16"):
            forward, backward = of_batch_norm(devices, 64, dtype)
            cells = [f"{len(c)} | {sum(one.bytes for one in c):,}" for c in (forward, backward)]
            print(f"| {devices} | {dtype} | {' | '.join(cells)} |")


def medians(
    first: Callable[[], object], second: Callable[[], object], rounds: int = 101
) -> tuple[float, float, float]:
    """Return the median seconds of both, timed in turn, and the median difference of pairs."""
    times = turn_by_turn({"first": first, "second": second}, at_least=rounds, at_most=rounds)
    both = list(zip(times["first"], times["second"], strict=True))
    return (
        statistics.median(times["first"]),
        statistics.median(times["second"]),
        statistics.median(a - b for a, b in both),
    )


def print_measured() -> None:
    """Measure a training step of one layer with and without `axis_name`, on CPU devices."""
    print(
        "\nMeasured on CPU devices of one machine, 64 rows each, forward and backward, medians:\n"
    )
    print("| devices | features | own | shared | difference |\n|---|---|---|---|---|")
    for devices in (2, 4, 8):
        for features in (64, 2048):
            first = training_step(devices, features, "data")
            second = training_step(devices, features, None)
            shared, own, difference = medians(first, second)
            cells = " | ".join(f"{1e6 * t:,.0f} µs" for t in (own, shared, difference))
            print(f"| {devices} | {features} | {cells} |")


def training_step(devices: int, features: int, axis_name: str | None) -> Callable[[], object]:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    params, state = jaxbn.init((64, features))
    x = jax.random.normal(jax.random.key(0), (64 * devices, features))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))

    def step(x):
        def forward(x):
            return jaxbn.batch_norm(params, state, x, True, axis_name=axis_name)

        y, vjp, _ = jax.vjp(forward, x, has_aux=True)
        return vjp(y)[0]

    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    )
    return lambda: mapped(x)


def print_modelled(latency: float, bandwidth: float) -> None:
    total = sum(RESNET50)
    print(
        f"\nModelled for ResNet-50 ({len(RESNET50)} layers, {total:,} features), a latency of "
        f"{1e6 * latency:g} µs a round, {bandwidth / 1e9:g} GB/s a device:\n"
    )
    groups = " | ".join(f"float32, groups of {g}" for g in GROUPS)
    print(f"| devices | float32: bytes forward | float32 | {groups} | half precision |")
    print("|---" * (4 + len(GROUPS)) + "|")
    for devices in DEVICES:
        seconds = [
            step_seconds(min(devices, group), latency, bandwidth, table_seconds)
            for group in (devices, *GROUPS)
        ]
        seconds.append(step_seconds(devices, latency, bandwidth, sums_seconds))
        cells = " | ".join(f"{1e3 * one:.1f} ms" for one in seconds)
        print(f"| {devices} | {table_bytes(devices, total) / 1e6:,.0f} MB | {cells} |")


def plot(path: Path, latency: float, bandwidth: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")

    def line(label: str, style: str, forward: Seconds, group: int = max(DEVICES), **given) -> None:
        times = [1e3 * step_seconds(min(d, group), latency, bandwidth, forward) for d in DEVICES]
        axes.plot(DEVICES, times, style, label=label, **given)

    first, *of_groups, last = COLORS[: len(GROUPS) + 2]
    line("float32, all devices together", "o-", table_seconds, color=first)
    for group, color in zip(GROUPS, of_groups, strict=True):
        line(f"float32, groups of {group}", "o-", table_seconds, group, color=color)
    line("half precision, all devices together", "s--", sums_seconds, color=last)
    axes.set(
        xscale="log",
        ylim=(0, None),
        xlabel="devices",
        ylabel="milliseconds a step",
        title="ResNet-50: what a step waits for its 53 batch norms (model)",
    )
    axes.set_xticks(DEVICES, [str(d) for d in DEVICES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--latency", type=float, default=5e-6, help="seconds a round of a collective"
    )
    parser.add_argument("--bandwidth", type=float, default=100e9, help="bytes a second and device")
    parser.add_argument(
        "--out", type=Path, default=Path("out/scaling"), help="folder for the picture"
    )
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    matplotlib.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    print_counted()
    print_measured()
    print_modelled(args.latency, args.bandwidth)
    plot(args.out / "scaling.png", args.latency, args.bandwidth)


if __name__ == "__main__":
    main()
