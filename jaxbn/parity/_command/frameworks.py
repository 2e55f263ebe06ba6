"""Make the batch norm of each framework, at its own defaults."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._init import init
from jaxbn.parity._adapters import (
    batch_norm_layer,
    equinox_layer,
    haiku_layer,
    keras_layer,
    linen_layer,
    nnx_layer,
    torch_layer,
)
from jaxbn.parity._layer import DifferentiableLayer


class Parameters(NamedTuple):
    """The parameters of a layer: (C,) each, in the dtype that it keeps them in."""

    scale: np.ndarray
    bias: np.ndarray


Maker = Callable[[Parameters], DifferentiableLayer]


def make_ours(parameters: Parameters) -> DifferentiableLayer:
    _, state = init(parameters.scale.shape, param_dtype=parameters.scale.dtype)
    return batch_norm_layer(_as_jax(parameters), state)


def make_torch(parameters: Parameters) -> DifferentiableLayer:
    import torch

    (jax_device,) = jnp.zeros(()).devices()
    device = jax_device.platform
    if device not in ("cpu", "gpu") or (device == "gpu" and not torch.cuda.is_available()):
        raise ImportError(f"this PyTorch, {torch.__version__}, does not run on {device}")
    layer = torch.nn.BatchNorm1d(len(parameters.scale))
    layer = layer.to("cuda" if device == "gpu" else "cpu", getattr(torch, str(_dtype(parameters))))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(parameters.scale))
        layer.bias.copy_(torch.tensor(parameters.bias))
    return torch_layer(layer)


def make_linen(parameters: Parameters) -> DifferentiableLayer:
    import flax.linen

    module = flax.linen.BatchNorm(param_dtype=_dtype(parameters))
    _, state = init(parameters.scale.shape, param_dtype=_dtype(parameters))
    variables = {"params": _as_jax(parameters), "batch_stats": state}
    return linen_layer(module, variables)


def make_nnx(parameters: Parameters) -> DifferentiableLayer:
    from flax import nnx

    params = _as_jax(parameters)
    layer = nnx.BatchNorm(
        len(parameters.scale),
        param_dtype=_dtype(parameters),
        scale_init=lambda *_: params["scale"],
        bias_init=lambda *_: params["bias"],
        rngs=nnx.Rngs(0),
    )
    return nnx_layer(layer)


def make_haiku(parameters: Parameters) -> DifferentiableLayer:
    import haiku as hk

    # Haiku has no default decay; 0.99 is that of most other frameworks.
    transformed = hk.transform_with_state(
        lambda x, is_training: hk.BatchNorm(True, True, 0.99)(x, is_training)
    )
    scale, bias = (v[None] for v in _as_jax(parameters).values())
    _, state = transformed.init(None, scale, True)
    return haiku_layer(transformed, {"batch_norm": {"scale": scale, "offset": bias}}, state)


def make_equinox(
    parameters: Parameters, mode: Literal["batch", "ema"] = "batch"
) -> DifferentiableLayer:
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        len(parameters.scale), "batch", mode=mode, dtype=_dtype(parameters)
    )
    values = tuple(_as_jax(parameters).values())
    layer = eqx.tree_at(lambda one: (one.weight, one.bias), layer, values)
    return equinox_layer(layer, state)


def make_equinox_ema(parameters: Parameters) -> DifferentiableLayer:
    return make_equinox(parameters, mode="ema")


def make_keras(parameters: Parameters) -> DifferentiableLayer:
    os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is first imported
    import keras

    if keras.backend.backend() != "jax":
        raise ImportError(f"Keras runs on its {keras.backend.backend()} backend, not on JAX")
    layer = keras.layers.BatchNormalization(dtype=str(_dtype(parameters)))
    layer.build((None, len(parameters.scale)))
    for variable, value in zip(layer.trainable_variables, parameters, strict=True):
        variable.assign(value)
    return keras_layer(layer)


FRAMEWORKS: Mapping[str, tuple[str, Maker]] = {
    "ours": ("jaxbn", make_ours),
    "torch": ("PyTorch", make_torch),
    "linen": ("flax.linen", make_linen),
    "nnx": ("flax.nnx", make_nnx),
    "haiku": ("Haiku", make_haiku),
    "equinox": ("Equinox", make_equinox),
    "equinox-ema": ("Equinox, ema", make_equinox_ema),
    "keras": ("Keras", make_keras),
}

_NOT_INSTALLED = " is not installed"


def available(
    names: Sequence[str], parameters: Parameters
) -> tuple[dict[str, Maker], dict[str, str]]:
    """Return the makers of the frameworks that run here, and why the others do not, by title."""
    found, missing = {}, {}
    for name in names:
        title, make = FRAMEWORKS[name]
        try:
            make(parameters)
            found[title] = make
        except ModuleNotFoundError as error:
            missing[title] = f"{error.name}{_NOT_INSTALLED}"
        except ImportError as error:
            missing[title] = str(error)
    return found, missing


def how_to_install(missing: Mapping[str, str]) -> str:
    """Return what installs the frameworks that `available` did not find, or nothing."""
    if not any(why.endswith(_NOT_INSTALLED) for why in missing.values()):
        return ""
    return "pip install 'jaxbn[frameworks]' installs every framework"


def _as_jax(parameters: Parameters) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in parameters._asdict().items()}


def _dtype(parameters: Parameters) -> Any:
    return parameters.scale.dtype
