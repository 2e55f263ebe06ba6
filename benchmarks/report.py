"""Write the results as tables in Markdown."""

import os
import platform
import sys
import textwrap
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax

from benchmarks.report_compiled import compiled, table

_PACKAGES = ["jax", "jaxlib", "flax", "dm-haiku", "equinox", "torch", "numpy"]
PASSES = {
    "forward": "training, forward",
    "forward_backward": "training, forward and backward",
    "evaluate": "evaluation",
}


def environment() -> dict[str, Any]:
    versions = {}
    for package in ["jaxbn", *_PACKAGES]:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "versions": versions,
    }


def _missing(data: dict[str, Any]) -> str:
    return "".join(f"\n\nLeft out: {name} ({why})." for name, why in data["missing"].items())


def _number(value: float | None, form: str, none: str = "-") -> str:
    return none if value is None else format(value, form)


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def speed(data: dict[str, Any]) -> str:
    names = list(dict.fromkeys(one["contender"] for one in data["summary"]))
    columns = [name for name in names if name != "ours"]
    text = [
        "## Speed\n\nRatios are our time over theirs: below 1, ours is faster. The floor is the "
        "time of the least memory traffic, 3 passes forward and 8 forward and backward, by that of "
        "a copy of the batch; the last columns say how much of each one's time it is, over batches "
        "that are large enough to tell. (N, C) batches stand under NHWC. The data:",
        "\n".join(f"- {name}: {what}." for name, what in data["data"].items()),
        "### Geometric means over the shapes",
        table(
            [
                *("pass", "data", "type", "layout", "shapes"),
                *[f"ours / {name}" for name in columns],
                *[f"floor / {name}" for name in names],
            ],
            _speed_rows(data["summary"], columns, names),
        ),
    ]
    for kind, title in PASSES.items():
        cases = [{**c, "ms": c["seconds"] * 1e3} for c in data["cases"] if c["pass"] == kind]
        ours = [c for c in cases if c["contender"] == "ours"]
        text += [
            f"### Each shape: {title}",
            table(
                [
                    *("data", "shape", "type", "layout", "rounds", "ours, ms", "floor / ours"),
                    *[f"ours / {name}" for name in columns],
                ],
                [
                    [
                        one["data"],
                        _shape(one["shape"]),
                        one["dtype"],
                        one["layout"],
                        str(one["rounds"]),
                        f"{one['ms']:.3g}",
                        _number(one["of_floor"], ".2f"),
                        *[
                            f"{c['ours_over_it']:.2f}"
                            for c in cases
                            if c["contender"] in columns
                            and all(c[k] == one[k] for k in ("data", "shape", "dtype", "layout"))
                        ],
                    ]
                    for one in ours
                ],
            ),
        ]
    return "\n\n".join(text) + _missing(data)


def _speed_rows(summary, columns, names) -> Iterable[list[str]]:
    keys = ("pass", "data", "dtype", "layout", "shapes")
    groups: dict[tuple, dict[str, dict]] = {}
    for one in summary:
        groups.setdefault(tuple(one[key] for key in keys), {})[one["contender"]] = one
    passes, data = list(PASSES), list(dict.fromkeys(one["data"] for one in summary))
    for key, group in sorted(
        groups.items(), key=lambda item: (passes.index(item[0][0]), data.index(item[0][1]))
    ):
        yield [
            *(PASSES[key[0]], *map(str, key[1:])),
            *[f"{group[name]['ours_over_it']:.2f}" for name in columns],
            *[_number(group[name]["of_floor"], ".2f") for name in names],
        ]


def memory(data: dict[str, Any]) -> str:
    flax = {one["dtype"]: one for one in data["cases"] if one["layer"] == "Flax"}

    def row(one: dict[str, Any]) -> list[str]:
        cells = [one["dtype"], one["layer"], f"{one['kept_per_input_byte']:.2f}"]
        temporary = one["step_temporary_bytes"]
        if temporary is None:
            return [*cells, "not told", "not told"]
        ratio = temporary / flax[one["dtype"]]["step_temporary_bytes"]
        return [*cells, f"{temporary / 1e6:.2f} MB", f"{ratio:.2f}"]

    return (
        f"## Memory\n\nKept for the backward pass of one layer, input {_shape(data['shape'])}; "
        f"temporaries of the compiled training step of a residual network, images "
        f"{_shape(data['images'])}.\n\n"
    ) + table(
        ["type", "layer", "bytes kept per input byte", "temporaries of the step", "over Flax's"],
        map(row, data["cases"]),
    )


def accuracy(data: dict[str, Any]) -> str:
    names = list(next(iter(data["errors"].values())))
    rows = [
        [
            *(name, _shape(data["shapes"][name])),
            *[" / ".join(_number(e, ".0e", "nan") for e in errors[c].values()) for c in names],
        ]
        for name, errors in data["errors"].items()
    ]
    return (
        f"## Accuracy\n\nLargest error of y / dx / dscale against extended precision, relative to "
        f"the largest value (absolute where all are zero), {data['dtype']}. The shape is (values "
        f"of a feature, features).\n\n{table(['input', 'shape', *names], rows)}{_missing(data)}"
    )


def training_step(data: dict[str, Any]) -> str:
    name = "A small residual network" if "blocks" in data["model"] else "ResNet-18"
    model = ", ".join(f"{key}={value}" for key, value in data["model"].items()) or "as published"
    rows = [
        [
            one["dtype"],
            str(one["rounds"]),
            *[f"{1e3 * one['seconds'][name]:.3g} ms" for name in ("ours", "Flax")],
            f"{one['ours_over_flax']:.3f}",
            f"{one['norms_off_zero']} of {one['norms']}",
        ]
        for one in data["cases"]
    ]
    return (
        f"## A whole training step\n\n{name} ({model}) at initialization, crops of photographs "
        f"{_shape(data['images'])}, running statistics warmed up; medians, and the median of "
        "ratios of pairs. A norm is off zero where the mean of some feature of its input exceeds "
        "its deviation.\n\n"
    ) + table(["type", "rounds", "with ours", "with Flax's", "ours / Flax", "norms off zero"], rows)


def forms(data: dict[str, Any]) -> str:
    rows = [
        [
            *(one["dtype"], one["form"], f"{1e3 * one['seconds']:.3g} ms"),
            *(f"{one['over_copy']:.2f}", _number(one["written_per_input_byte"], ".2f", "not told")),
        ]
        for one in data["cases"]
    ]
    return (
        f"## Forms\n\nOf the sums over a batch {_shape(data['shape'])} and of its moments; the "
        "means of its features are drawn from N(0, 1), deviation 1. A form of the library for "
        "another platform is compiled for this one.\n\n"
    ) + table(["type", "form", "time", "over a copy's", "temporaries per input byte"], rows)


def recompute(data: dict[str, Any]) -> str:
    plain = {one["dtype"]: one for one in reversed(data["cases"])}  # the first of each

    def row(one: dict[str, Any]) -> list[str]:
        memory = ["not told", "not told"]
        if (temporary := one["temporary_bytes"]) is not None:
            ratio = temporary / plain[one["dtype"]]["temporary_bytes"]
            memory = [f"{temporary / 1e6:.1f} MB", f"{ratio:.2f}"]
        return [
            *(one["dtype"], one["kept"], *memory),
            *(f"{1e3 * one['seconds']:.3g} ms", f"{one['over_all']:.2f}"),
        ]

    return (
        f"## Recomputing\n\nForward and backward through {data['blocks']} blocks of 1 x 1 "
        f"convolution, batch norm and relu, {_shape(data['shape'])}, by what `jax.checkpoint` "
        "wraps and keeps. The input is N(0, 1).\n\n"
    ) + table(
        ["type", "kept of each block", "temporaries", "over all's", "time", "over all's"],
        map(row, data["cases"]),
    )


def collectives(data: dict[str, Any]) -> str:
    rows = [
        [
            str(one["devices"]),
            *[
                cell
                for found in (one["forward"], one["backward"])
                for cell in (str(len(found)), f"{sum(bytes_ for _, bytes_ in found):,}")
            ],
        ]
        for one in data["cases"]
    ]
    return (
        f"## Collectives\n\nOf one layer of {data['features']} features under `shard_map`, counted "
        f"in the program compiled for {data['backend']} devices.\n\n"
    ) + table(["devices", "forward", "bytes", "added by the backward", "bytes"], rows)


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "speed": speed,
    "memory": memory,
    "accuracy": accuracy,
    "training_step": training_step,
    "recompute": recompute,
    "forms": forms,
    "collectives": collectives,
    "compiled": compiled,
}


def markdown(results: dict[str, Any], command: str) -> str:
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    text = [
        "# Benchmarks",
        f"```bash\n{command}\n```",
        f"{where['devices']} x {where['device']} ({where['backend']}), {where['processor']}, "
        f"{where['cpu_cores']} processor cores; {versions}.",
    ]
    text += [_SECTIONS[name](data) for name, data in results["sections"].items()]
    lines = "\n\n".join(text).split("\n")
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    """Wrap a line of prose at 100 columns. Tables, headings and commands are not prose."""
    if line.startswith(("|", "#", "python")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return "\n".join(
        textwrap.wrap(line, 100, subsequent_indent=indent, break_on_hyphens=False) or [line]
    )
