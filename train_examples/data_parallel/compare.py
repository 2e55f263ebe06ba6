"""The command: how far runs on many devices end from the run on one, as a table in Markdown."""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train_examples.data_parallel.config import MODES, Config
from train_examples.data_parallel.train import train
from train_examples.digits.train import ONE_DEVICE, Metrics, TrainState, fit, network

DTYPES = ("float64", "float32")
# The usual batch of 64 images splits evenly over 8, and needs padding on 7.
DEVICES = (8, 7)
PROCESSES = 2


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.data_parallel.compare", description=__doc__
    )
    parser.add_argument("--epochs", type=int, default=1, help="of each run (default: 1)")
    epochs = parser.parse_args().epochs
    jax.config.update("jax_num_cpu_devices", max(DEVICES))

    wanted = {dtype: one_device(Config(epochs=epochs, dtype=dtype)) for dtype in DTYPES}
    print(f"| after {wanted[DTYPES[0]].step} steps | devices | {' | '.join(DTYPES)} |")
    print("|---|---|" + "---|" * len(DTYPES))
    for name, run, config in runs(Config(epochs=epochs)):
        got = {dtype: run(replace(config, dtype=dtype)) for dtype in DTYPES}
        distances = " | ".join(f"{distance(got[dtype], wanted[dtype]):.0e}" for dtype in DTYPES)
        devices = (config.devices or 1) * config.processes
        print(f"| {name} | {devices} | {distances} |", flush=True)


def runs(config: Config) -> Iterator[tuple[str, Callable[[Config], TrainState], Config]]:
    """What is compared with one device: names, functions that run it, and options."""
    for mode in MODES:
        for devices in DEVICES:
            yield f"`{mode}`", many_devices, replace(config, mode=mode, devices=devices)
        name = f"`{mode}`, {PROCESSES} processes"
        yield name, many_devices, replace(config, mode=mode, devices=4, processes=PROCESSES)
    yield "rows of each batch in reverse", one_device_in_reverse, config


def one_device(config: Config, step: Callable[..., Any] = ONE_DEVICE.step) -> TrainState:
    """The final state of the digits example."""
    with temporary(config) as config, jax.enable_x64(config.dtype == "float64"):
        return fit(network(config), config, ONE_DEVICE._replace(step=step))[0]


def one_device_in_reverse(config: Config) -> TrainState:
    """As `one_device`, but for rounding: how far that alone takes a run."""

    def step(
        state: TrainState, images: np.ndarray, labels: np.ndarray
    ) -> tuple[TrainState, Metrics]:
        return ONE_DEVICE.step(state, images[::-1], labels[::-1])

    return one_device(config, step)


def many_devices(config: Config) -> TrainState:
    """The final state of a run, which is the command's where it has several processes."""
    with temporary(config) as config:
        if config.processes > 1:
            options = ("epochs", "dtype", "mode", "devices", "processes", "out")
            argv = [f"--{name}={getattr(config, name)}" for name in options]
            command = [sys.executable, "-m", "train_examples.data_parallel", *argv]
            subprocess.run(command, check=True, stdout=sys.stderr)
            # To resume a run that is complete is to read its final state.
            config = replace(config, processes=1, resume=True)
        return train(config).state


@contextlib.contextmanager
def temporary(config: Config) -> Iterator[Config]:
    """`config` with a folder that goes away, and only the table on standard output."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        yield replace(config, out=Path(out))


def distance(state: TrainState, wanted: TrainState) -> float:
    """The largest difference in any parameter or moving average of two states.

    Of each array, relative to its largest value.
    """

    def arrays(state: TrainState) -> list[Any]:
        return [np.asarray(a) for a in jax.tree.leaves((state.params, state.batch_stats))]

    pairs = zip(arrays(state), arrays(wanted), strict=True)
    # NumPy's maximum: Python's passes over NaN.
    return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs]))


if __name__ == "__main__":
    main()
