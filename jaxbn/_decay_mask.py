"""A mask of the parameters that weight decay should shrink."""

from typing import Any

import jax
from jax.tree_util import DictKey, KeyPath

from jaxbn._trees import unboxed_path

_NOT_DECAYED = {"scale", "bias", "mean", "var", "count"}


def decay_mask(variables: Any) -> Any:
    r"""Return which variables weight decay should shrink: all but scales, biases and statistics.

    .. math::

        \mathrm{decays} = \mathrm{name} \notin
            \{\mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var}, \mathrm{count}\}

    The result is a mask for Optax. Where Optax takes a function that makes the mask, pass this one:
    `optax.adamw(1e-3, mask=decay_mask)`.

    Variables are recognized by the names that Flax gives them, so the biases of dense layers and
    convolutions, and the scales of other normalizations, are excluded too. Shrinking a kernel
    before a batch norm does not change what the network computes (it changes the effective learning
    rate); shrinking a scale does.

    Args:
      variables: a nested tree of parameters of any shapes and dtypes, as in `flax.linen` (`params`,
        or all collections) or `flax.nnx` (`nnx.state(model, nnx.Param)`). The name of a leaf is the
        last name on its path.

    Returns:
      A tree of the same structure with booleans as leaves: True where weights decay.

    Raises:
      ValueError: a leaf has no name.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn, optax
      >>> params, _ = jaxbn.init((8, 2))
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2))}, "BatchNorm_0": params}
      >>> jaxbn.decay_mask(params)
      {'BatchNorm_0': {'bias': False, 'scale': False}, 'Dense_0': {'kernel': True}}
      >>> tx = optax.masked(optax.add_decayed_weights(1e-4), jaxbn.decay_mask)
      >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> print(updates["Dense_0"]["kernel"].max(), updates["BatchNorm_0"]["scale"].max())
      1e-04 0.0

    Source: He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks",
    2019, section 3.1.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in _NOT_DECAYED, variables
    )


def _name(path: KeyPath) -> str:
    for key in reversed(unboxed_path(path)):
        name = key.key if isinstance(key, DictKey) else getattr(key, "name", None)
        if isinstance(name, str):
            return name
    raise ValueError(
        f"variables must name its leaves, as {{'kernel': ..., 'bias': ...}} does; the leaf at "
        f"{jax.tree_util.keystr(path) or 'the root'} has no name."
    )
