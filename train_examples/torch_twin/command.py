"""The steps of the command: train in lockstep, print tables and a verdict, write the results."""

from rich.console import Console

from train_examples.common.errors import UserError
from train_examples.common.plots import DPI
from train_examples.torch_twin import report
from train_examples.torch_twin.config import Config
from train_examples.torch_twin.lockstep import train
from train_examples.torch_twin.plots import picture


def run(config: Config, console: Console) -> None:
    """Train and report; raise a `UserError` if the frameworks diverge in float64."""
    history = train(config)
    for table in report.tables(history):
        console.print(table)
    config.out.mkdir(parents=True, exist_ok=True)
    report.write_numbers(config, history, config.out / "distances.json")
    picture(history).savefig(config.out / "distances.png", dpi=DPI)
    console.print(f"wrote distances.json and distances.png to {config.out}")
    console.print(report.float32_summary(history))
    within, verdict = report.float64_verdict(history)
    console.print(verdict)
    if not within:
        raise UserError("the frameworks diverge in float64.")
