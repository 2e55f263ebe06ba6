"""The options of a run on many devices, and the check of their values."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_examples.common import config as one_device
from train_examples.common.config import add_options, check, parse
from train_examples.common.errors import UserError

MODES = ("shard_map", "pmap", "jit")
OUT = Path("out/data_parallel")


@dataclass(frozen=True)
class Config(one_device.Config):
    """The options of the digits example, and the devices and processes of the run."""

    out: Path = OUT
    mode: str = "shard_map"
    devices: int | None = None
    processes: int = 1
    coordinator: str | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.mode in MODES, "--mode", f"one of {', '.join(MODES)}", self.mode)
        enough = self.devices is None or self.devices >= 1
        check(enough, "--devices", "at least 1", self.devices)
        check(self.processes >= 1, "--processes", "at least 1", self.processes)
        if (self.coordinator is None) != (self.process_id is None):
            raise UserError(
                "--coordinator and --process-id go together: the address where process 0 listens, "
                "and which process this one is. Leave both out, and --processes starts all "
                "processes on this machine."
            )
        if self.coordinator is not None:
            if self.processes == 1:
                raise UserError(
                    "--coordinator is for several processes: --processes must be at least 2, got 1."
                )
            _check_address(self.coordinator)
        if self.process_id is not None and not 0 <= self.process_id < self.processes:
            raise UserError(
                f"--process-id must be in [0, {self.processes}), as --processes is "
                f"{self.processes}; got {self.process_id}."
            )

    def decisive(self) -> dict[str, Any]:
        """Return the same as for one device: devices and processes change nothing but rounding."""
        spread = {"mode", "devices", "processes", "coordinator", "process_id"}
        return {k: v for k, v in super().decisive().items() if k not in spread}


def how_to_resume(config: Config) -> str:
    """Return what to tell the user after a run has stopped or failed."""
    return f"--resume --out {config.out} continues after the last complete epoch."


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line; exit with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.data_parallel",
        description="Trains the network of train_examples.digits on many devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=MODES, default=Config.mode, help="how JAX maps the step over devices")
    add("--processes", type=int, default=Config.processes, help="in the whole run")
    # A default of None would only clutter the help.
    unset = argparse.SUPPRESS
    add("--devices", type=int, default=unset, help="of each process; by default, all it has")
    add("--coordinator", default=unset, metavar="HOST:PORT", help="where process 0 listens")
    add("--process-id", type=int, default=unset, help="which process of the run this one is")
    add_options(parser, OUT)
    return parse(parser, Config, argv)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"--coordinator must be HOST:PORT, such as localhost:12345, got {address!r}."
        )
