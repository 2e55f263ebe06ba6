"""Rules that change the options of the batch norms of a model."""

from collections.abc import Mapping
from typing import Any

from jaxbn import _checks
from jaxbn._conventions import FLAX
from jaxbn._options import Options
from jaxbn._patterns import matches

# The options of this library's layers that Flax's layers lack, with their defaults.
FLAX_LACKS: Mapping[str, Any] = {
    "batch_variance": "biased",
    "running_variance": "biased",
    "virtual_batch_size": None,
    "frozen": False,
    "track": True,
}
# The options that a rule may change. The others determine shapes or belong to the model's code.
_CHANGEABLE = (
    *("frozen", "track"),
    *(name for name in Options._fields if name != "axis"),
    *("r_max", "d_max"),
)
# Each rule must be valid for this layer. It has a mapped axis, so a rule may set only its groups.
_ANY_LAYER = {
    "axis": -1,
    **FLAX,
    "axis_name": "devices",
    "axis_index_groups": None,
    "virtual_batch_size": None,
}


class Rules:
    """Options for the layers whose paths match patterns. Later rules win.

    Attributes:
      called: the paths of the batch norms that the model has called so far.
      stored: the paths that have running statistics.
      visited: the paths of all modules that the model has called so far.
    """

    def __init__(self, rules: Any):
        _checks.mapping("rules", rules, advice='; for example {"backbone/**": {"frozen": True}}')
        for pattern, options in rules.items():
            _check(pattern, options)
        self._rules = {pattern: dict(options) for pattern, options in rules.items()}
        self.called: set[str] = set()
        self.stored: set[str] = set()
        self.visited: set[str] = set()

    @property
    def paths(self) -> set[str]:
        """The paths of the model's batch norms, as far as they are known.

        A module that has running statistics, and was called without calling a batch norm of this
        library or of Flax, is another kind of norm, which rules cannot change.
        """
        return self.called | (self.stored - self.visited)

    def options(self, path: str) -> dict[str, Any]:
        """Return the options that the rules give to the layer at `path`."""
        options: dict[str, Any] = {}
        for pattern, given in self._rules.items():
            if matches(pattern, path):
                options |= given
        return options

    def check_matched(self, cause: Exception | None = None) -> None:
        """Check that every pattern matches one of `paths`. `cause` may be a consequence."""
        for pattern in self._rules:
            if not any(matches(pattern, path) for path in self.paths):
                having = ", ".join(map(repr, sorted(self.paths))) or "none"
                raise ValueError(
                    f"rules must only have patterns that match a batch norm of the model, got "
                    f"{pattern!r}. The paths of its batch norms: {having}."
                ) from cause


class Overridden:
    """A layer of this library or of Flax, seen with other options."""

    def __init__(self, layer: Any, options: Mapping[str, Any]):
        self._layer, self._options = layer, options

    def __getattr__(self, name: str) -> Any:
        if name in self._options:
            return self._options[name]
        if name in FLAX_LACKS:
            return getattr(self._layer, name, FLAX_LACKS[name])
        return getattr(self._layer, name)


def _check(pattern: Any, options: Any) -> None:
    """Check that a rule is valid for some layer."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"rules must map path patterns, such as 'backbone/**', to options, got the pattern "
            f"{pattern!r} of type {type(pattern).__name__}."
        )
    _checks.mapping(f"rules[{pattern!r}]", options, advice='; for example {"frozen": True}')
    if unknown := [name for name in options if name not in _CHANGEABLE]:
        raise ValueError(
            f"rules[{pattern!r}] may only have the options {', '.join(map(repr, _CHANGEABLE))}; "
            f"got {', '.join(map(repr, unknown))}."
        )
    for name in ("frozen", "track"):
        if name in options:
            _checks.python_bool(name, options[name])
    if "momentum" in options and options["momentum"] is None:
        raise ValueError(
            f"rules[{pattern!r}] must have a number as 'momentum', got None: the cumulative "
            f"average needs a count among the model's variables, which rules do not change."
        )
    for name, least in (("r_max", 1), ("d_max", 0)):
        if name in options:
            _checks.renorm_limit(name, options[name], least)
    values = _ANY_LAYER | dict(options)
    Options(*(values[name] for name in Options._fields)).check()
