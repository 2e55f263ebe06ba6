"""A traced model as a list of steps, in which calls of compiled blocks are inlined."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from jaxbn.inference._tags import Tag, tag_of

# Primitives that run the jaxpr in their parameters once, on the arguments that they get.
_CALLS = {
    *("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"),
}


class Step(NamedTuple):
    """An equation whose inputs and outputs are numbers of values of the program.

    Attributes:
      equation: the equation, of which the primitive and its parameters count.
      inputs, outputs: the numbers of the values.
      tag: the mark that the step sets, if it sets one.
    """

    equation: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tag: Tag | None


class Program(NamedTuple):
    """A traced function.

    Attributes:
      inputs, outputs: the numbers of the function's arguments and results, as leaves.
      constants: constant values by their numbers.
      steps: the steps, in an order in which they can be run.
      hidden: marks inside loops and branches, with the names of their primitives.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]
    steps: list[Step]
    hidden: list[tuple[Tag, str]]


def program(closed_jaxpr: Any) -> Program:
    """Return a traced function as a program."""
    inliner = _Inliner()
    inputs = inliner.new_values(len(closed_jaxpr.jaxpr.invars))
    outputs = inliner.inline(closed_jaxpr, inputs)
    return Program(inputs, outputs, inliner.constants, inliner.steps, inliner.hidden)


def run(program: Program, inputs: Sequence[Any], change: Callable[[Tag, Any], Any]) -> list[Any]:
    """Run a program, and replace each marked value by `change(tag, value)`."""
    values = dict(program.constants)
    values.update(zip(program.inputs, inputs, strict=True))
    for step in program.steps:
        arguments = [values[k] for k in step.inputs]
        if step.tag is not None:
            results = [change(step.tag, *arguments)]
        else:
            primitive = step.equation.primitive
            params = primitive.get_bind_params(step.equation.params)
            results = primitive.bind(*arguments, **params)
            if not primitive.multiple_results:
                results = [results]
        values.update(zip(step.outputs, results, strict=True))
    return [values[k] for k in program.outputs]


class _Inliner:
    def __init__(self) -> None:
        self.constants: dict[int, Any] = {}
        self.steps: list[Step] = []
        self.hidden: list[tuple[Tag, str]] = []
        self._values = 0

    def new_values(self, count: int) -> tuple[int, ...]:
        self._values += count
        return tuple(range(self._values - count, self._values))

    def inline(self, jaxpr: Any, inputs: Sequence[int]) -> tuple[int, ...]:
        """Append the steps of a jaxpr, and return the numbers of its results."""
        open_jaxpr, constants = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
        numbers = dict(zip(open_jaxpr.invars, inputs, strict=True))
        for variable, value in zip(open_jaxpr.constvars, constants, strict=True):
            numbers[variable] = self._constant(value)

        def number(atom: Any) -> int:
            return self._constant(atom.val) if isinstance(atom, Literal) else numbers[atom]

        for equation in open_jaxpr.eqns:
            arguments = tuple(map(number, equation.invars))
            inner = list(_jaxprs(equation))
            tags = [tag for called in inner for tag in _tags(called)]
            if tags and len(inner) == 1 and equation.primitive.name in _CALLS:
                results = self.inline(inner[0], arguments)
            else:
                results = self.new_values(len(equation.outvars))
                self.steps.append(Step(equation, arguments, results, tag_of(equation)))
                self.hidden += [(tag, equation.primitive.name) for tag in tags]
            numbers.update(zip(equation.outvars, results, strict=True))
        return tuple(map(number, open_jaxpr.outvars))

    def _constant(self, value: Any) -> int:
        (number,) = self.new_values(1)
        self.constants[number] = value
        return number


def name(equation: Any) -> str:
    """Return the name of the function that an equation calls, or of its primitive."""
    called = equation.params.get("name")
    if isinstance(called, str):
        return called
    # Functions with derivatives of their own, such as relu, wrap a compiled function with a name.
    inner = [eqn for jaxpr in _jaxprs(equation) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns]
    return name(inner[0]) if len(inner) == 1 else equation.primitive.name


def _jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs in the parameters of an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part


def _tags(jaxpr: Any) -> Iterator[Tag]:
    """Yield the marks in a jaxpr and in those inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if (tag := tag_of(equation)) is not None:
            yield tag
        for inner in _jaxprs(equation):
            yield from _tags(inner)
