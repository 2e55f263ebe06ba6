"""Pair the running statistics of two networks, and compare those of two runs."""

from collections.abc import Mapping

import numpy as np

from jaxbn.parity._networks.network import MeanAndVar, StatisticsByName


def pairs_and_notes(
    ours: tuple[str, StatisticsByName],
    theirs: tuple[str, StatisticsByName],
    names: Mapping[str, str],
) -> tuple[list[tuple[str, MeanAndVar, MeanAndVar]], list[str]]:
    """Pair the statistics by the submodules' names, and note the ones that no name covers.

    Args:
      ours, theirs: what messages call each network, and its statistics.
      names: the names of submodules.
    """
    (label, left), (other_label, right) = ours, theirs
    paired = {k: v for k, v in names.items() if k in left and v in right}
    left_out = [
        f"{who}'s {sorted(missing)}"
        for who, missing in (
            (label, left.keys() - paired.keys()),
            (other_label, right.keys() - set(paired.values())),
        )
        if missing
    ]
    pairs = [(name, left[name], right[other]) for name, other in paired.items()]
    if not left_out:
        return pairs, []
    which = "not all" if pairs else "no"
    return pairs, [
        f"{which} running statistics were compared: names has no pair for {' and '.join(left_out)}"
    ]


def are_equal(left: StatisticsByName, right: StatisticsByName) -> bool:
    """Return whether there are statistics, and all of them are equal."""
    return (
        bool(left)
        and left.keys() == right.keys()
        and all(
            np.array_equal(one, other, equal_nan=True)
            for name in left
            for one, other in zip(left[name], right[name], strict=True)
        )
    )
