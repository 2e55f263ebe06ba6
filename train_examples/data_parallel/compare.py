"""The command: print how far runs on many devices end from the run on one, in Markdown."""

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

from train_examples.common.training import ONE_DEVICE, fit, network
from train_examples.data_parallel.config import MODES, Config
from train_examples.data_parallel.train import train
from train_examples.digits.train import Metrics, TrainState

DTYPES = ("float64", "float32")
# The usual batch of 64 images splits evenly over 8, and needs padding on 7.
DEVICES = (8, 7)
PROCESSES = 2


def main() -> None:
    """Run the command line."""
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
    """Yield the name, the function and the options of each run to compare with one device."""
    for mode in MODES:
        for devices in DEVICES:
            yield f"`{mode}`", many_devices, replace(config, mode=mode, devices=devices)
        name = f"`{mode}`, {PROCESSES} processes"
        yield name, many_devices, replace(config, mode=mode, devices=4, processes=PROCESSES)
    yield "rows of each batch in reverse", one_device_in_reverse, config


def one_device(config: Config, step: Callable[..., Any] = ONE_DEVICE.step) -> TrainState:
    """Return the final state of the digits example on one device."""
    with temporary(config) as config, jax.enable_x64(config.dtype == "float64"):
        return fit(network(config), config, ONE_DEVICE._replace(step=step))[0]


def one_device_in_reverse(config: Config) -> TrainState:
    """Return the same up to rounding: the sums over each batch are in another order."""

    def step(
        state: TrainState, images: np.ndarray, labels: np.ndarray
    ) -> tuple[TrainState, Metrics]:
        return ONE_DEVICE.step(state, images[::-1], labels[::-1])

    return one_device(config, step)


def many_devices(config: Config) -> TrainState:
    """Return the final state of a run; if it has several processes, the command runs it."""
    with temporary(config) as config:
        if config.processes > 1:
            options = ("epochs", "dtype", "mode", "devices", "processes", "out")
            argv = [f"--{name}={getattr(config, name)}" for name in options]
            command = [sys.executable, "-m", "train_examples.data_parallel", *argv]
            subprocess.run(command, check=True, stdout=sys.stderr)
            # Resuming a run that is complete reads its final state.
            config = replace(config, processes=1, resume=True)
        return train(config).state


@contextlib.contextmanager
def temporary(config: Config) -> Iterator[Config]:
    """Yield `config` with a temporary folder, and keep standard output for the table."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        yield replace(config, out=Path(out))


def distance(state: TrainState, wanted: TrainState) -> float:
    """Return the largest difference between the parameters and moving averages of two states.

    The difference of each array is relative to its largest value.
    """

    def arrays(state: TrainState) -> list[Any]:
        return [np.asarray(a) for a in jax.tree.leaves((state.params, state.batch_stats))]

    pairs = zip(arrays(state), arrays(wanted), strict=True)
    # NumPy's maximum is NaN if any value is; Python's may not be.
    return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs]))


if __name__ == "__main__":
    main()
