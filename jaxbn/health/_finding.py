"""A finding: one thing that is wrong with a batch norm."""

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
      path: the path of the layer, such as "backbone/BatchNorm_0", which patterns of `override` can
        match; empty for the whole network.
      code: what is wrong, as a short code.
      text: what was found and what to do, in sentences.
    """

    path: str
    code: Code
    text: str
