"""Find the layer whose output a batch norm normalizes, and what prevents folding."""

from collections import deque
from typing import NamedTuple

from jaxbn.inference._program import Step, name
from jaxbn.inference._tags import Path, Place, Tag, as_text
from jaxbn.inference._traced_model import TracedModel

# They change no value.
_IDENTITIES = {"copy", "name", "optimization_barrier", "sharding_constraint", "stop_gradient"}


class Placement(NamedTuple):
    """Where a batch norm stands.

    Attributes:
      layer: the path of the layer that it directly follows, or None.
      problem: why it cannot be folded into that layer, or None.
    """

    layer: Path | None
    problem: str | None


def placements(traced: TracedModel) -> dict[Path, Placement]:
    """Return where each batch norm stands, in the order of the computation."""
    flow = _Flow(traced)
    tags = (step.tag for step in traced.program.steps if step.tag is not None)
    order = [tag.path for tag in tags if tag.place is Place.NORM_INPUT]
    return {path: flow.placement(path) for path in dict.fromkeys([*order, *traced.norms])}


class _Flow:
    """How values flow through a traced model."""

    def __init__(self, traced: TracedModel):
        self._traced = traced
        self._origin: dict[int, int] = {}
        self._producers: dict[int, Step] = {}
        self._consumers: dict[int, list[Step]] = {}
        self._tagged: dict[Tag, list[Step]] = {}
        for step in traced.program.steps:
            for k in {self._resolve(k) for k in step.inputs}:
                self._consumers.setdefault(k, []).append(step)
            self._producers |= dict.fromkeys(step.outputs, step)
            if step.tag is not None:
                self._tagged.setdefault(step.tag, []).append(step)
            elif step.equation.primitive.name in _IDENTITIES:
                inputs = map(self._resolve, step.inputs)
                self._origin |= dict(zip(step.outputs, inputs, strict=True))
        self._outputs = {self._resolve(k) for k in traced.program.outputs}

    def _resolve(self, value: int) -> int:
        return self._origin.get(value, value)

    def placement(self, norm: Path) -> Placement:
        """Return where a batch norm stands."""
        if (problem := self._call_problem(norm, Place.NORM_INPUT)) is not None:
            return Placement(None, problem)
        (step,) = self._tagged[Tag(Place.NORM_INPUT, norm)]
        tag, between = self._nearest(step.inputs[0])
        if tag is None:
            return Placement(None, f"{as_text(norm)} follows no layer that has a kernel")
        if between:
            stands = "stands" if len(between) == 1 else "stand"
            names = ", ".join(between[:4]) + (", ..." if len(between) > 4 else "")
            return Placement(
                None, f"{names} {stands} between {as_text(tag.path)} and {as_text(norm)}"
            )
        if tag.place is Place.NORM_OUTPUT:
            return Placement(
                None, f"{as_text(norm)} follows {as_text(tag.path)}, which is a batch norm too"
            )
        problem = self._traced.norms[norm].problem or self._layer_problem(tag.path, norm)
        return Placement(tag.path, problem or self._map_problem(norm, step))

    def _map_problem(self, norm: Path, step: Step) -> str | None:
        """Return that a batch norm is called inside `jax.vmap`, which moves axes, or None."""
        shape = getattr(step.equation.outvars[0].aval, "shape", ())
        in_call = self._traced.norms[norm].shape
        if shape == in_call:
            return None
        return (
            f"{as_text(norm)} is called inside a map: its input has the shape {in_call} in the "
            f"call and {shape} in the model, as inside jax.vmap"
        )

    def _call_problem(self, path: Path, place: Place) -> str | None:
        """Return why the calls of a layer or batch norm prevent folding, or None."""
        for tag, primitive in self._traced.program.hidden:
            if tag == Tag(place, path):
                return f"{as_text(path)} is called inside a loop, branch or map ({primitive})"
        steps = self._tagged.get(Tag(place, path), ())
        if len(steps) == 1:
            return None
        if not steps:
            return f"{as_text(path)} is not called on the output of a layer"
        if len({id(step.equation) for step in steps}) < len(steps):
            return (
                f"{as_text(path)} is compiled once and called {len(steps)} times, as are equal "
                f"blocks of one nn.jit class"
            )
        return f"{as_text(path)} is called {len(steps)} times"

    def _layer_problem(self, layer: Path, norm: Path) -> str | None:
        """Return why nothing can be folded into a layer, or None."""
        if (problem := self._call_problem(layer, Place.LAYER_OUTPUT)) is not None:
            return problem
        facts, name = self._traced.layers[layer], as_text(layer)
        if not layer:
            return "nothing can be folded into the model: its kernel is not in a module below it"
        if facts.problem is not None:
            return f"nothing can be folded into {name}: {facts.problem}"
        (output,) = self._tagged[Tag(Place.LAYER_OUTPUT, layer)]
        (value,) = output.outputs
        others = [
            _description(step)
            for step in self._consumers.get(value, [])
            if step.tag != Tag(Place.NORM_INPUT, norm) and not self._is_identity(step)
        ]
        if others:
            return f"the output of {name} also goes to {', '.join(dict.fromkeys(others))}"
        if value in self._outputs:
            return f"the output of {name} is also an output of the model"
        for parameter, number in self._traced.parameters[layer].items():
            if (place := self._use_outside(number, output)) is not None:
                return f"the {parameter} of {name} is also used by {place}"
        return None

    def _is_identity(self, step: Step) -> bool:
        return any(k in self._origin for k in step.outputs)

    def _nearest(self, value: int) -> tuple[Tag | None, tuple[str, ...]]:
        """Return the nearest output of a layer or batch norm before a value, and what is between.

        Without one, return None.
        """
        waiting: deque[tuple[int, tuple[str, ...]]] = deque([(value, ())])
        visited = set()
        while waiting:
            number, names = waiting.popleft()
            number = self._resolve(number)
            step = self._producers.get(number)
            if step is None or number in visited:
                continue
            visited.add(number)
            if step.tag is None:
                names = (self._dropout(step) or _description(step), *names)
            elif step.tag.place in (Place.LAYER_OUTPUT, Place.NORM_OUTPUT):
                return step.tag, names
            waiting.extend((k, names) for k in step.inputs)
        return None, ()

    def _dropout(self, step: Step) -> str | None:
        """Return what to call a step that selects values at random, or None for other steps."""
        sources = [
            self._producers[k] for k in map(self._resolve, step.inputs) if k in self._producers
        ]
        is_random = any(s.tag is None and name(s.equation) == "_bernoulli" for s in sources)
        return "an active dropout" if is_random else None

    def _use_outside(self, value: int, output: Step) -> str | None:
        """Return what depends on a parameter in another way than through a layer's output."""
        waiting, visited = [value], set()
        while waiting:
            number = waiting.pop()
            if number in visited:
                continue
            visited.add(number)
            if number in self._traced.program.outputs:
                return "the output of the model"
            for step in self._consumers.get(self._resolve(number), []):
                if step is output:
                    continue
                if step.tag is not None:
                    return as_text(step.tag.path)
                waiting += step.outputs
        return None


def _description(step: Step) -> str:
    """Return the name of a step for an error message."""
    return as_text(step.tag.path) if step.tag is not None else name(step.equation)
