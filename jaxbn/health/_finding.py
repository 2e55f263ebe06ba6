"""One thing that is wrong with a batch norm."""

from typing import Literal, NamedTuple

Code = Literal[
    "never-updated",
    "off",
    "non-finite",
    "negative-variance",
    "dead-features",
    "few-values",
    "eval-differs",
    "replicas-differ",
]


class Finding(NamedTuple):
    """One thing that is wrong with a batch norm, and what to do about it.

    Attributes:
      path: the path of the layer, such as "backbone/BatchNorm_0", as the patterns of `override`
        match it; empty for the whole network.
      code: what is wrong, in a word.
      text: what was found and what to do, in sentences.
    """

    path: str
    code: Code
    text: str
