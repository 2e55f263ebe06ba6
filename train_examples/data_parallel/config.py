"""The options of a run on many devices, and what is wrong with them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_examples.digits import config as one_device
from train_examples.digits.config import UserError, add_options, parse

MODES = ("shard_map", "pmap", "jit")
OUT = Path("out/data_parallel")


@dataclass(frozen=True)
class Config(one_device.Config):
    """The options of the digits example, and what the run is spread over."""

    out: Path = OUT
    mode: str = "shard_map"
    devices: int | None = None
    processes: int = 1
    coordinator: str | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise UserError(f"--mode must be one of {', '.join(MODES)}, got {self.mode}.")
        if self.devices is not None and self.devices < 1:
            raise UserError(f"--devices must be at least 1, got {self.devices}.")
        if self.processes < 1:
            raise UserError(f"--processes must be at least 1, got {self.processes}.")
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
        """As for one device: what the run is spread over changes nothing but rounding."""
        spread = {"mode", "devices", "processes", "coordinator", "process_id"}
        return {k: v for k, v in super().decisive().items() if k not in spread}


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.data_parallel",
        description="Trains the network of train_examples.digits on many devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=MODES, default=Config.mode, help="how JAX maps the step over devices")
    add("--processes", type=int, default=Config.processes, help="in the whole run")
    # Without a default that is worth printing.
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
