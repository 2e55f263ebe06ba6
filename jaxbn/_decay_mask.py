"""Which parameters weight decay is for."""

from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, KeyPath

_NOT_DECAYED = {"scale", "bias", "mean", "var", "count"}


def decay_mask(variables: Any) -> Any:
    r"""Which variables weight decay should shrink: all but scales, biases and statistics.

    .. math::

        \mathrm{decays} = \mathrm{name} \notin
            \{\mathrm{scale}, \mathrm{bias}, \mathrm{mean}, \mathrm{var}, \mathrm{count}\}

    A mask for Optax, or the function that makes one there: `optax.adamw(1e-3, mask=decay_mask)`.
    It goes by the names that Flax gives leaves, so the biases of dense layers and convolutions, and
    other norms' scales, are left alone too. A kernel before a batch norm can shrink without a
    change of what the network computes (it steers the effective learning rate); a scale cannot.

    Args:
      variables: a nested tree of parameters, of whatever shapes and dtypes, as `flax.linen`
        (`params`, or all collections) or `flax.nnx` (`nnx.state(model, nnx.Param)`) nests them:
        each leaf's name is the last one on its path.

    Returns:
      A tree of the same structure with booleans for leaves, True where weights decay.

    Raises:
      ValueError: a leaf without a name.

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
    # Boxes, such as NNX's variables and Linen's partitioned ones, hold their array as `value`.
    inner = path[:-1] if path and path[-1] == GetAttrKey("value") else path
    for key in reversed(inner):
        name = key.key if isinstance(key, DictKey) else getattr(key, "name", None)
        if isinstance(name, str):
            return name
    raise ValueError(
        f"variables must name its leaves, as {{'kernel': ..., 'bias': ...}} does; the leaf at "
        f"{jax.tree_util.keystr(path) or 'the root'} has no name."
    )
