"""The command: run experiments, print their tables and verdicts, and draw their pictures."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_examples.common.errors import needs_extra, run_command

with needs_extra("examples"):
    from rich.console import Console

    from train_examples.common.plots import DPI
    from train_examples.questions import (
        batch_size,
        bias,
        epsilon,
        initialization,
        learning_rate,
        moving_averages,
    )
    from train_examples.questions.common import Settings

QUESTIONS = {
    1: (epsilon, "Why is there an epsilon in the denominator?"),
    2: (moving_averages, "Why moving averages at test time?"),
    3: (bias, "Is a bias needed in the layer before?"),
    4: (learning_rate, "What does it allow for the learning rate?"),
    5: (initialization, "How does it change the sensitivity to weight initialization?"),
    6: (batch_size, "How does batch size relate to its regularizing effect?"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line, or exit with a message if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.questions",
        description="Answers questions about batch normalization by experiments on the digits.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {number}  {text}" for number, (_, text) in QUESTIONS.items()),
    )
    add = parser.add_argument
    add("questions", nargs="*", type=int, metavar="question", help="1 to 6 (default: all)")
    add("--out", type=Path, default=Path("out/questions"), help="folder for the pictures")
    add("--seeds", type=int, default=Settings().seeds, help="runs of each kind (default: 3)")
    add("--quick", action="store_true", help="only check that everything works")
    args = parser.parse_args(argv)

    unknown = sorted(set(args.questions) - set(QUESTIONS))
    if unknown:
        numbers = ", ".join(map(str, unknown))
        parser.error(f"there are questions 1 to {max(QUESTIONS)}, got {numbers}.")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}.")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; it must be a folder, or not exist yet.")
    return args


def main(argv: Sequence[str] | None = None) -> dict[int, Any]:
    """Run the command line `argv`, and return the result of each question."""
    args = parse_args(argv)
    settings = Settings(args.seeds, args.quick)
    # Wide enough for every table, wherever it is printed.
    console = Console(width=140)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_command(
        lambda: {
            number: answer(number, settings, args.out, console)
            for number in sorted(set(args.questions)) or QUESTIONS
        }
    )


def answer(number: int, settings: Settings, out: Path, console: Console) -> Any:
    """Run the experiment of one question, print its verdicts, and return its result."""
    experiment, text = QUESTIONS[number]
    console.print(f"\n{number}. {text}\n", style="bold")
    start = time.perf_counter()
    result = experiment.run(settings)
    for table in experiment.tables(result):
        console.print(table)
    if settings.quick:
        console.print("Note: --quick runs are too small to answer the question.")
    for verdict in experiment.verdicts(result):
        console.print(f"- {verdict}", soft_wrap=True, highlight=False)
    path = out / f"{experiment.__name__.rsplit('.', 1)[-1]}.png"
    experiment.plot(result).savefig(path, dpi=DPI)
    console.print(f"wrote {path} after {time.perf_counter() - start:.0f} s", soft_wrap=True)
    return result


if __name__ == "__main__":
    main()
