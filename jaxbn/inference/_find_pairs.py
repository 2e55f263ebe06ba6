"""Find the layers into which batch norms can be folded, by running the model."""

from typing import Any

from jaxbn.inference._pairs import found_pairs
from jaxbn.inference._tags import as_text
from jaxbn.inference._trace import traced_model


def find_pairs(model: Any, variables: Any, example: Any, **apply_kwargs: Any) -> dict[str, str]:
    """Find each layer whose output goes directly into a batch norm, and nowhere else.

    The model is traced on the example input in evaluation mode, without computing anything. Layers
    are modules with a `kernel`, from Flax or elsewhere. Batch norms are those of this library and
    of Flax, and classes derived from them. A batch norm is left out if

    - any operation lies between it and the layer, even a reshape;
    - the layer's output, kernel or bias is also used elsewhere;
    - the layer has no bias and is not one of Flax's layers, which read the bias that folding adds;
    - either is called a second time, or inside `nn.scan`, `nn.vmap` or another loop, branch or
      map (also if equal blocks share one `nn.jit`);
    - it has a mask, or its features are not on the last axis.

    Args:
      model: a `flax.linen.Module` or a `flax.nnx.Module`. It is not changed.
      variables: the variables of a Linen model, an `nnx.State`, or None to use the variables that
        an `nnx.Module` holds. They may be shapes, such as those from `jax.eval_shape`.
      example: an input of the model, as for `jaxbn.calibrate.recalibrate`: an array, a tuple of
        positional arguments, or a dict of keyword arguments. Arrays may be `jax.ShapeDtypeStruct`.
      **apply_kwargs: further arguments of `model.apply`, or of the NNX model, such as
        `train=False`.

    Returns:
      A mapping from the path of each layer to the path of its batch norm, in the order of the
      computation. `fold_linen` and `fold_nnx` take it as `pairs`.

    Raises:
      TypeError: `model` or `variables` has another type.
      ValueError: a batch norm is in training mode.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.linen
      >>> from jaxbn.inference import find_pairs
      >>> norm = jaxbn.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Dense(4), norm, nn.relu, nn.Dense(4), nn.relu, norm.copy()])
      >>> x = jax.numpy.ones((8, 3))
      >>> find_pairs(model, model.init(jax.random.key(0), x), x)
      {'layers_0': 'layers_1'}
    """
    pairs, _ = found_pairs(traced_model(model, variables, example, apply_kwargs))
    return {as_text(pair.layer): as_text(pair.norm) for pair in pairs}
