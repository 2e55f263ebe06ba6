"""Find which layers of two networks correspond."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from jaxbn.parity._networks.layers import Facts
from jaxbn.parity._networks.make import make_networks
from jaxbn.parity._networks.network import Call
from jaxbn.parity._networks.options import CallOptions

# How many layers around the first one without a counterpart an error lists.
_AROUND = 3


def match_names(
    candidate: Any,
    reference: Any,
    x: np.ndarray,
    *,
    evaluation: Mapping[str, Any] | None = None,
    channels_first: Collection[int] = (4, 5),
) -> dict[str, str]:
    """Run two networks on an example, and return which layers correspond.

    Layers are all submodules with parameters or running statistics of their own: batch norms and
    other norms, convolutions, linear layers and embeddings. If both networks call layers of the
    same kinds and shapes in the same order, the layers are matched in that order. Otherwise, for
    example if only one network computes the shortcut of a block first, the layers of each kind and
    shape are matched in the order in which they are called. Batch norms are then matched only if
    the layers before them have the same kind and shape, too.

    The values of the parameters are not used. So if only one network computes a shortcut first, and
    the shortcut has the kind and shape of a layer of the main branch, the two are matched
    incorrectly. `compare_models` then reports a difference there, and you must swap the two names.

    Args:
      candidate: the network whose names are the keys: a Linen module, bound, in the pair `(model,
        variables)`, or alone, since shapes are enough; an NNX module, or the parts that `nnx.split`
        returns for it; a built Keras model on the JAX backend; or a PyTorch module.
      reference: the other network, of any of these kinds.
      x: an input in Flax's layout, a batch of images (N, H, W, C).
      evaluation: the keyword arguments for calling a Flax model in evaluation. By default, those of
        the usual ones that its `__call__` accepts: `train=False`, `training=False`,
        `is_training=False`, `deterministic=True` and `use_running_average=True`.
      channels_first: the ranks of arrays whose channels come first in PyTorch and last in Flax.

    Returns:
      A mapping from the name of each layer of the candidate to its name in the reference, in the
      order of the candidate's calls: {"ResBlock_0/BatchNorm_1": "blocks.0.bn2"}. `compare_models`
      takes it as `names`.

    Raises:
      ValueError: a layer has no counterpart; neither network has layers; or `x` has its channels
        first, or its dtype differs from that of a PyTorch model.
      TypeError: one of the networks is of an unknown kind.

    Example:
      >>> import flax.linen as nn, numpy as np, torch
      >>> from jaxbn.parity import match_names
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.Dense(4, name="dense")(x)
      ...         return nn.BatchNorm(use_running_average=not train, name="norm")(x)
      >>> theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
      >>> match_names(Net(), theirs, np.ones((8, 3), np.float32))
      {'dense': '0', 'norm': '1'}
    """
    options = CallOptions(evaluation, None)
    networks = make_networks(candidate, reference, options, channels_first, need_variables=False)
    x = np.asarray(x)
    for network in networks:
        network.check_dtype(x)
    ours, theirs = ((network.label, network.calls(x, False)) for network in networks)
    return matched(ours, theirs)


# The name of a network in messages, and the calls of its submodules.
LabelAndCalls = tuple[str, Sequence[Call]]


def matched(candidate: LabelAndCalls, reference: LabelAndCalls) -> dict[str, str]:
    """Return a mapping from the names of the candidate's layers to those of the reference's."""
    ours, theirs = _first_calls(candidate[1]), _first_calls(reference[1])
    if not ours and not theirs:
        raise ValueError(
            "neither network calls a submodule with parameters or statistics of its own, so there "
            "is nothing to match."
        )
    if [call.layer for call in ours] == [call.layer for call in theirs]:
        return {a.name: b.name for a, b in zip(ours, theirs, strict=True)}
    left = _Side(candidate[0], ours, _signatures(ours))
    right = _Side(reference[0], theirs, _signatures(theirs))
    if Counter(left.signatures) != Counter(right.signatures):
        _raise_without_counterpart(left, right)
    places: dict[Any, list[str]] = defaultdict(list)
    for signature, call in zip(right.signatures, theirs, strict=True):
        places[signature].append(call.name)
    return {
        a.name: places[signature].pop(0) for signature, a in zip(left.signatures, ours, strict=True)
    }


def _first_calls(calls: Sequence[Call]) -> list[Call]:
    """Return the first call of each layer. A layer that is called again has the same parameters."""
    found: dict[str, Call] = {}
    for call in calls:
        if call.layer is not None:
            found.setdefault(call.name, call)
    return list(found.values())


def _signatures(calls: Sequence[Call]) -> list[tuple[Facts, Facts | None]]:
    """Return facts about each layer and, for a batch norm, about the layer directly before it."""
    layers = {call.name: call.layer for call in calls}
    signatures = []
    for call in calls:
        assert call.layer is not None
        is_norm = call.layer.kind == "batch norm"
        before = layers.get(call.source) if is_norm and call.source is not None else None
        signatures.append((call.layer, before))
    return signatures


class _Side(NamedTuple):
    """The layers of one network, and the signature of each."""

    label: str
    layers: Sequence[Call]
    signatures: Sequence[tuple[Facts, Facts | None]]

    def around(self, place: int) -> str:
        """Return a text that lists the layers around a place."""
        start, stop = max(place - _AROUND, 0), place + _AROUND + 1
        shown = [f"{call.name} ({call.layer})" for call in self.layers[start:stop]]
        before, after = ["..."] * (start > 0), ["..."] * (stop < len(self.layers))
        return f"{self.label} calls {', '.join([*before, *shown, *after]) or 'no layers'}"


def _raise_without_counterpart(ours: _Side, theirs: _Side) -> None:
    """Raise an error that names the first layer without a counterpart."""
    matcher = SequenceMatcher(None, ours.signatures, theirs.signatures, autojunk=False)
    for tag, *places in matcher.get_opcodes():
        if tag == "equal":
            continue
        i, i_end, j, j_end = places
        around = f"{ours.around(i)}; {theirs.around(j)}"
        for side, other, first, end in ((ours, theirs, i, i_end), (theirs, ours, j, j_end)):
            for layer, signature in zip(
                side.layers[first:end], side.signatures[first:end], strict=True
            ):
                if side.signatures.count(signature) > other.signatures.count(signature):
                    raise ValueError(
                        f"{layer.name} in {side.label}, {_described(*signature)}, has no "
                        f"counterpart in {other.label}. {around}."
                    )


def _described(layer: Facts, before: Facts | None) -> str:
    return str(layer) if before is None else f"{layer} directly after {before}"
