"""Convert batch norms of PyTorch, Keras, Haiku and Equinox to `params` and `state`, and back.

====== ==================== ================ ============================= ===================
jaxbn  PyTorch              Keras            Haiku                         Equinox
====== ==================== ================ ============================= ===================
scale  weight               gamma            scale                         weight
bias   bias                 beta             offset                        bias
mean   running_mean         moving_mean      mean_ema: average             in its state
var    running_var          moving_variance  var_ema: average              in its state
count  num_batches_tracked                   counter of both               where mode="batch"
====== ==================== ================ ============================= ===================

Only NumPy and JAX are imported, none of the frameworks, except that `load_torch` and
`load_batch_norms` import Flax when they are called. Values are converted bit for bit and keep
their dtype (float64 becomes float32 unless JAX's 64-bit types are enabled, as everywhere in JAX).
Only averages that a framework stores without their bias correction, Equinox's in mode "batch" and
Haiku's `hidden`, are rounded. Values share no memory with the tensors and NumPy arrays that they
come from.

The convention that a layer was trained with is not stored in its values. Pass it to `batch_norm` as
keywords, such as `jaxbn.PYTORCH` or `jaxbn.KERAS`; the documentation of each function names it.

`put_batch_norms` and `load_batch_norms` put the results into a Flax model, Linen or NNX.
`variables_from_torch` and `load_torch` do the same with a whole PyTorch model: they also convert
convolutions, linear layers, embeddings and other norms.

Read files with a reader that does not run code from them: `load_file(path)` of `safetensors.numpy`,
`safetensors.flax` or `safetensors.torch`, or `torch.load(path, weights_only=True)`. Each returns a
mapping that `from_torch` and `batch_norms_from_torch` take, in bfloat16 too. For bytes in memory,
use `safetensors.torch.load(data)`: `load` of `safetensors.numpy` and `safetensors.flax` does not
support bfloat16, and raises `KeyError: 'BF16'`.
"""

from jaxbn.convert._equinox import from_equinox as from_equinox
from jaxbn.convert._equinox import to_equinox as to_equinox
from jaxbn.convert._haiku import from_haiku as from_haiku
from jaxbn.convert._haiku import to_haiku as to_haiku
from jaxbn.convert._keras import from_keras as from_keras
from jaxbn.convert._keras import to_keras as to_keras
from jaxbn.convert._keras_model import batch_norms_from_keras as batch_norms_from_keras
from jaxbn.convert._load_batch_norms import load_batch_norms as load_batch_norms
from jaxbn.convert._load_batch_norms import put_batch_norms as put_batch_norms
from jaxbn.convert._load_torch import load_torch as load_torch
from jaxbn.convert._load_torch import variables_from_torch as variables_from_torch
from jaxbn.convert._torch import batch_norms_from_torch as batch_norms_from_torch
from jaxbn.convert._torch import from_torch as from_torch
from jaxbn.convert._torch import to_torch as to_torch

__all__ = [
    "batch_norms_from_keras",
    "batch_norms_from_torch",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_torch",
    "load_batch_norms",
    "load_torch",
    "put_batch_norms",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_torch",
    "variables_from_torch",
]
