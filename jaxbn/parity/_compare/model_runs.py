"""Run two networks in evaluation and in training, and pair what they record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.parity._compare.model_statistics import are_equal, pairs_and_notes
from jaxbn.parity._match import matched
from jaxbn.parity._networks.network import INPUT, OUTPUT, Call, Network, Run

MODES = ("evaluation", "training")


class Quantity(NamedTuple):
    """An array of both networks.

    Attributes:
      stage: "training forward".
      name: the name of the intermediate in the candidate.
      ours, theirs: the candidate's array and the reference's.
    """

    stage: str
    name: str
    ours: np.ndarray
    theirs: np.ndarray


class Runs(NamedTuple):
    """The runs of two networks in each mode.

    Attributes:
      names: the candidate's names, and the reference's for each.
      ours, theirs: the runs of the candidate and of the reference, by mode.
    """

    names: Mapping[str, str]
    ours: Mapping[str, Run]
    theirs: Mapping[str, Run]

    def quantities(self) -> Iterator[Quantity]:
        """Yield all quantities in the order of the computation."""
        for mode in MODES:
            for name, other in [*self.names.items(), (OUTPUT, OUTPUT)]:
                ours, theirs = self.ours[mode].values[name], self.theirs[mode].values[other]
                yield Quantity(f"{mode} forward", name, ours, theirs)
        a, b = self.ours["training"].statistics, self.theirs["training"].statistics
        for name, left, right in pairs_and_notes(("", a), ("", b), self.names)[0]:
            for which, one, other in zip(("mean", "var"), left, right, strict=True):
                yield Quantity("running statistics", f"{name} {which}", one, other)
        for mode in MODES:
            ours, theirs = self.ours[mode].gradients, self.theirs[mode].gradients
            for name, other in [*reversed(list(self.names.items())), (INPUT, INPUT)]:
                if name in ours and other in theirs:
                    yield Quantity(f"{mode} backward", name, ours[name], theirs[other])

    def notes(self, candidate: Network, reference: Network) -> list[str]:
        """Return what could not be compared, and what may explain a difference."""
        a, b = self.ours["training"], self.theirs["training"]
        ours, theirs = (candidate.label, a.statistics), (reference.label, b.statistics)
        notes = pairs_and_notes(ours, theirs, self.names)[1]
        both = {candidate.label: self.ours, reference.label: self.theirs}
        alike = [
            label
            for label, runs in both.items()
            if are_equal(*(runs[mode].statistics for mode in MODES))
        ]
        # Two networks that both ignore the mode, such as frozen ones, need no note.
        if len(alike) == 1:
            notes.append(
                f"{alike[0]}'s running statistics are the same after training as after evaluation: "
                "its norms are frozen, or do not follow the mode (that of a Flax model can be set "
                "by the arguments evaluation and training)"
            )
        for label, runs in both.items():
            if dropouts := runs["training"].dropouts:
                notes.append(
                    f"in training, {label}'s dropout is active, so what follows it is random: "
                    f"{', '.join(dropouts)}"
                )
        return notes


def run_both(
    candidate: Network, reference: Network, names: Mapping[str, str], x: np.ndarray
) -> Runs:
    """Run two networks on one input, in evaluation and in training."""
    ours = {mode: candidate.run(list(names), x, mode == "training") for mode in MODES}
    others = list(dict.fromkeys(names.values()))
    theirs = {mode: reference.run(others, x, mode == "training") for mode in MODES}
    return Runs(names, ours, theirs)


def checked_names(
    candidate: Network, reference: Network, names: Mapping[str, str] | None, x: np.ndarray
) -> tuple[Mapping[str, str], list[str]]:
    """Return the names, which are found if there are none, and notes on what has no name.

    Raises:
      ValueError: there are none.
      TypeError: they are not a mapping.
    """
    if names is not None and not isinstance(names, Mapping):
        raise TypeError(
            "names must be a mapping from the candidate's names to the reference's, such as "
            f"{{'block/bn': 'block.bn'}}, got {type(names).__name__}."
        )
    notes = []
    if names is None:
        ours, theirs = (network.calls(x, False) for network in (candidate, reference))
        found = matched((candidate.label, ours), (reference.label, theirs))
        single, other_single = (_recordable(calls) for calls in (ours, theirs))
        names = {k: v for k, v in found.items() if k in single and v in other_single}
        if len(names) < len(found):
            left_out = [name for name in found if name not in names]
            notes.append(
                f"not compared, since they are called several times or inside a transformation "
                f"such as nn.scan: {', '.join(left_out)}"
            )
    if not names:
        raise ValueError(
            "names is empty, so no intermediate and no running statistics would be compared; give "
            "at least one pair of a name in each network, such as {'block/bn': 'block.bn'}, or "
            "leave names out."
        )
    return names, notes


def _recordable(calls: Sequence[Call]) -> set[str]:
    """Return the names of the submodules whose output can be recorded."""
    times = Counter(call.name for call in calls)
    return {call.name for call in calls if times[call.name] == 1 and not call.transformed}


def checked_input(x: Any) -> np.ndarray:
    """Return the input as an array, or raise if it is a mapping, which is likely to be `names`."""
    if isinstance(x, Mapping):
        raise TypeError("x must be an array, got a mapping; names come after x, or are left out.")
    return np.asarray(x)
