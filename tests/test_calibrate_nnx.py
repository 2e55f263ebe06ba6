"""`recalibrate` on NNX models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.calibration import CUTS, TOLERANCE, cut, data
from tests.close import assert_close


class NNX(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([norm(4, rngs=rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

    def __call__(self, x, scale=1.0):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = self.dropout(nnx.relu(norm(dense(scale * x))))
        return x


class NoisyNNX(jaxbn.nnx.BatchNorm):
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x, use_running_average, mask=mask) + 1


NNX_NORMS = {
    "jaxbn's": jaxbn.nnx.BatchNorm,
    "Flax's": partial(nnx.BatchNorm, use_fast_variance=False),
    "inherited": NoisyNNX,
}


@pytest.mark.parametrize("mode", ["train", "eval", "graphdef", "statistics alone"])
@pytest.mark.parametrize("name", NNX_NORMS)
def test_nnx_is_one_step_on_all_data(name, mode):
    x = data()
    reference = NNX(partial(NNX_NORMS[name], momentum=0.0), nnx.Rngs(0))
    nnx.jit(lambda model, x: model(x, scale=1.5))(reference, x)
    want = nnx.to_pure_dict(nnx.state(reference, nnx.BatchStat))

    model = NNX(NNX_NORMS[name], nnx.Rngs(0))
    if mode == "eval":
        model.eval()
    graphdef, state = nnx.split(model)
    given = nnx.state(model, nnx.BatchStat) if mode == "statistics alone" else state
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    got = recalibrate(
        graphdef if mode == "graphdef" else model, given, cut(x, CUTS["odd last"]), scale=1.5
    )
    assert isinstance(got, nnx.State) and jax.tree.structure(got) == jax.tree.structure(given)
    assert nnx.graphdef(model) == graphdef
    after = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, after, before)

    nnx.update(model, got)
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_close(stats, want, TOLERANCE["float32"])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model, nnx.Param)),
                 nnx.to_pure_dict(nnx.state(reference, nnx.Param)))  # fmt: skip


class NNXTransforms(nnx.Module):
    """Layers in a scan and in remat, and one that is called twice."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return jaxbn.nnx.BatchNorm(4, rngs=rngs)

        self.layers, self.norm = layers(rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs)
        self.again = self.norm

    def __call__(self, x):
        x = nnx.scan(lambda x, norm: nnx.tanh(3 * norm(x) + 1), in_axes=(nnx.Carry, 0),
                     out_axes=nnx.Carry)(x, self.layers)  # fmt: skip
        x = nnx.remat(lambda norm, x: norm(x))(self.norm, x)
        return self.again(nnx.relu(x))


def test_nnx_transforms():
    x = data()
    model = NNXTransforms(nnx.Rngs(0))
    (one, two) = (
        recalibrate(model, nnx.state(model), cut(x, CUTS[name])) for name in ("one", "odd last")
    )
    assert_close(one, two, TOLERANCE["float32"])
    np.testing.assert_allclose(one["layers"]["mean"][0], x.mean((0, 1)), rtol=1e-5)


def in_bfloat16(values, dtype=None):
    return tuple(None if v is None else jnp.asarray(v, jnp.bfloat16) for v in values)


@pytest.mark.parametrize("promote_dtype", [None, in_bfloat16])
@pytest.mark.parametrize("layer", [jaxbn.nnx.BatchNorm, nnx.BatchNorm])
def test_outputs_have_the_dtype_that_the_layer_gives_them(layer, promote_dtype):
    class Model(nnx.Module):
        def __init__(self):
            options = {} if promote_dtype is None else {"promote_dtype": promote_dtype}
            self.norm = layer(4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)

        def __call__(self, x):
            y = self.norm(x)
            dtypes.append(y.dtype)
            return y

    dtypes = []
    model, x = Model(), jnp.asarray(data(), jnp.bfloat16)
    wanted = model(x).dtype
    assert wanted == (jnp.float32 if promote_dtype is None else jnp.bfloat16)
    recalibrate(model, nnx.state(model), [x])
    assert set(dtypes) == {wanted}


@pytest.mark.parametrize("layer", [jaxbn.nnx.BatchNorm, nnx.BatchNorm])
def test_inputs_and_masks_of_integers(layer):
    x = np.arange(12).reshape(4, 3)
    model = layer(3, rngs=nnx.Rngs(0))
    got = recalibrate(model, nnx.state(model), [x[:3], x[3:]], mask=np.array([1, 0, 1]))
    np.testing.assert_allclose(got["mean"][...], [4.5, 0, 6.5], rtol=1e-6)
    np.testing.assert_allclose(got["var"][...], [11.25, 1, 11.25], rtol=1e-6)
