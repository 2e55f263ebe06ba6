"""Write the counts of compiled programs as tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.targets import TARGETS

_LAYERS = ["ours", "Flax", "Flax stable"]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compiled(data: dict[str, Any]) -> str:
    text = [
        "## Compiled for accelerators",
        "Counted in programs that XLA compiled for these machines, without the machines: what a "
        "program reads and writes is a fact of the compiler, and says nothing certain about time.",
    ]
    for target, found in data["targets"].items():
        text += _of_target(target, found)
    text += [f"Left out: {why}." for why in data["missing"].values()]
    return "\n\n".join(text)


def _of_target(target: str, found: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    counted = {
        "gpu": "Bytes are those of the operands and results of all kernels; of an operand that a "
        "kernel only slices, those of the slice. The body of a loop would not be among them.",
        "tpu": 'Bytes are XLA\'s own "bytes accessed", which counts a round of each loop, and '
        "copies into and out of the chip's vector memory. What lies there is not among the "
        "temporaries. So only ratios compare with those of a GPU.",
    }
    text = [
        f"### {TARGETS[target].title}",
        f"{versions}. {counted[target]}",
        "#### One layer",
        "Bytes read and written over the input's; the floor is 3 forward, and 8 with the backward "
        "pass. The cotangent is a product of `y` with a matrix over the features, so it waits for "
        "`y`. The two passes of the product are subtracted; transpositions for its sake, with "
        "features first, are not. Ratios are ours over theirs.",
        _layers_table(found["layers"]),
        "#### A training step of a ResNet",
        _network_text(found["network"]),
        _network_table(found["network"]),
    ]
    if found["collectives"]:
        text += [
            "#### Batch norms on many chips",
            "Forward and backward, the gradients of the parameters included; each layer compiled "
            "alone, with two examples a chip. Bytes are those of a collective's result on one "
            "chip.",
            _collectives_table(found["collectives"]),
        ]
    return text


def _layers_table(records: Sequence[dict[str, Any]]) -> str:
    names = [name for name in _LAYERS if any(one["layer"] == name for one in records)]
    keys = ("backward", "dtype", "layout", "masked")
    groups: dict[tuple, dict[str, dict]] = {}
    for one in records:
        groups.setdefault(tuple(one[key] for key in keys), {})[one["layer"]] = one

    def row(key: tuple, group: dict[str, dict]) -> list[str]:
        backward, dtype, layout, masked = key
        passes = [group[name]["passes"] for name in names]
        return [
            "forward + backward" if backward else "forward",
            *(dtype, layout, "yes" if masked else "no"),
            *[f"{value:.2f}" for value in passes],
            *[f"{passes[0] / value:.2f}" for value in passes[1:]],
            *[
                " / ".join(cell(group[name]) for name in names)
                for cell in (
                    lambda one: str(one["kernels"]),
                    lambda one: str(one["loops"] + one["branches"]),
                    lambda one: f"{one['temporary_per_input_byte']:.2f}",
                )
            ],
        ]

    order = " / ".join(names)
    return table(
        [
            *("pass", "type", "layout", "mask", *names),
            *[f"over {name}" for name in names[1:]],
            *[f"{what}: {order}" for what in ("kernels", "loops and branches", "temporaries")],
        ],
        [row(*item) for item in sorted(groups.items(), key=lambda item: item[0][0])],
    )


def _network_text(records: Sequence[dict[str, Any]]) -> str:
    one = records[0]
    name = "ResNet-50" if one["blocks"] == [3, 4, 6, 3] else f"Bottleneck blocks {one['blocks']}"
    return (
        f"{name}, {one['images']} images of 224 x 224 pixels, bfloat16"
        + (f", over {one['devices']} chips under `jit`" if one["devices"] > 1 else "")
        + ". Bytes and temporaries are one device's."
    )


def _network_table(records: Sequence[dict[str, Any]]) -> str:
    (flax,) = [one for one in records if one["layer"] == "Flax"]
    rows = [
        [
            one["layer"],
            f"{one['bytes'] / 1e9:.2f} GB",
            f"{one['bytes'] / flax['bytes']:.3f}",
            *[str(one[key]) for key in ("kernels", "loops", "branches")],
            f"{one['temporary_bytes'] / 1e9:.2f} GB",
            *(str(one["collectives"]), f"{one['collective_bytes'] / 1e6:,.1f} MB"),
        ]
        for one in records
    ]
    head = ["layer", "bytes", "over Flax's", "kernels", "loops", "branches", "temporaries"]
    return table([*head, "collectives", "their bytes"], rows)


def _collectives_table(records: Sequence[dict[str, Any]]) -> str:
    def row(one: dict[str, Any]) -> list[str]:
        # For every number of features the program is the same, except for its sizes.
        first, last = one["each"][0], one["each"][-1]
        kinds = {", ".join(f"{n} {kind}" for kind, n in e["kinds"].items()) for e in one["each"]}
        return [
            *(f"{one['chips']} ({one['topology']})", one["under"], one["dtype"], one["layer"]),
            " or ".join(sorted(kinds)),
            *(f"{e['bytes']:,}" for e in (first, last)),
            *(str(one["collectives"]), f"{one['bytes'] / 1e6:,.3f} MB"),
        ]

    each = records[0]["each"]
    sizes = [f"bytes, {one['features']} features" for one in (each[0], each[-1])]
    count = sum(one["layers"] for one in each)
    return table(
        [
            *("chips", "under", "type", "layer", "collectives of a layer", *sizes),
            *(f"all {count} layers", "their bytes"),
        ],
        map(row, records),
    )
