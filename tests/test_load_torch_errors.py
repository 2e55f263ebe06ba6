"""What does not fit is listed, and nothing is loaded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn.convert import load_torch, variables_from_torch
from tests.conversion import assert_same
from tests.raises import raises

NAMES = {"conv": "conv1", "norm": "bn1", "head": "fc"}
# The variables of a network, of which only the shapes matter here.
VARIABLES = {
    "params": {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "head": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    },
    "batch_stats": {"norm": {"mean": jnp.ones(4), "var": jnp.ones(4)}},
}


def state_dict(**replaced):
    """Return entries that fit, with some replaced, or left out if they are None."""
    norm = ("weight", "bias", "running_mean", "running_var")
    entries = {
        "conv1.weight": np.zeros((4, 2, 3, 3), np.float32),
        **{f"bn1.{name}": np.zeros(4, np.float32) for name in norm},
        "bn1.num_batches_tracked": np.int64(3),
        "fc.weight": np.zeros((5, 4), np.float32),
        "fc.bias": np.zeros(5, np.float32),
    }
    entries |= {key.replace("__", "."): value for key, value in replaced.items()}
    return {key: value for key, value in entries.items() if value is not None}


def convert(entries, names=NAMES, variables=VARIABLES, **options):
    return variables_from_torch(entries, names, variables, **options)


def with_message(problems):
    return raises(ValueError, f"state_dict does not fit the model: {problems}.")


def test_what_fits():
    result = convert(state_dict())
    assert_same(result, jax.tree.map(jnp.zeros_like, VARIABLES))


CASES = {
    "missing entries": (
        state_dict(conv1__weight=None, bn1__running_var=None),
        {},
        "state_dict lacks 'conv1.weight', for conv/kernel; state_dict lacks 'bn1.running_var', for "
        "norm/var",
    ),
    "entries without a place": (
        state_dict(conv1__bias=np.zeros(4, np.float32), aux__weight=np.zeros(3, np.float32)),
        {},
        "no variable takes 'conv1.bias'; no variable takes 'aux.weight'",
    ),
    "layers without a name": (
        state_dict(),
        {"names": {"conv": "conv1", "head": "fc"}},
        "names lacks 'norm' (scale, bias, mean, var); no variable takes 'bn1.weight'; no variable "
        "takes 'bn1.bias'; no variable takes 'bn1.running_mean'; no variable takes "
        "'bn1.running_var'; no variable takes 'bn1.num_batches_tracked'",
    ),
    "misspelt paths": (
        state_dict(),
        {"names": {"conv": "conv1", "block.norm": "bn1", "fc": "head"}, "unused": ["bn1", "fc"]},
        "names has paths at which the model has no variables: 'block.norm', 'fc' (paths are "
        "written with '/'); names lacks 'norm' (scale, bias, mean, var); names lacks 'head' "
        "(kernel, bias)",
    ),
    "shapes": (
        state_dict(
            conv1__weight=np.zeros((4, 2, 5, 5), np.float32),
            bn1__weight=np.zeros(3, np.float32),
            fc__weight=np.zeros((4, 5), np.float32),
        ),
        {},
        "'conv1.weight' has shape (4, 2, 5, 5), (5, 5, 2, 4) in Flax's layout, but conv/kernel has "
        "shape (3, 3, 2, 4); 'bn1.weight' has shape (3,), but norm/scale has shape (4,); "
        "'fc.weight' has shape (4, 5), (5, 4) in Flax's layout, but head/kernel has shape (4, 5)",
    ),
    "dtypes": (
        state_dict(fc__weight=np.zeros((5, 4), np.int8)),
        {},
        "'fc.weight' has dtype int8, want a floating one",
    ),
    "sizes before the flattening": (
        state_dict(),
        {"flattened": {"head": (2, 3, 3), "fc": (1, 2, 2)}},
        "flattened has 'fc', which is not a layer of the model; flattened['head'] is (2, 3, 3), "
        "which are 18 features, and 'fc.weight' has shape (5, 4)",
    ),
    "names that are not there": (
        state_dict(),
        {"unused": ["aux"], "kept": ["tail"]},
        "kept has 'tail', which the model does not have; unused has 'aux', which state_dict does "
        "not have",
    ),
    "kept without a value": (
        state_dict(),
        {"kept": ["head"], "variables": jax.eval_shape(lambda: VARIABLES)},
        "head/bias is to be kept, but has no value, only a shape; head/kernel is to be kept, but "
        "has no value, only a shape",
    ),
}


@pytest.mark.parametrize("entries, options, problems", CASES.values(), ids=CASES.keys())
def test_all_problems_are_listed(entries, options, problems):
    with with_message(problems):
        convert(entries, **options)


def test_many_problems_are_cut():
    names = {f"layer{i}": f"layer{i}" for i in range(12)}
    variables = {"params": {name: {"bias": jnp.ones(1)} for name in names}}
    first = "; ".join(f"state_dict lacks 'layer{i}.bias', for layer{i}/bias" for i in range(10))
    with with_message(f"{first}; and 2 more"):
        convert({}, names, variables)


def test_unused_and_kept():
    """A new head keeps its values, whether the state dict has an old one or not."""
    entries = state_dict(aux__0__weight=np.zeros(3, np.float32))
    result = convert(entries, kept=["head"], unused=["aux"])
    assert_same(result["params"]["head"], VARIABLES["params"]["head"])
    assert_same(result["params"]["norm"]["scale"], jnp.zeros(4))
    entries = state_dict(fc__weight=None, fc__bias=None)
    assert_same(convert(entries, kept=["head"]), result)
    # Without its name, the old head is not known to be one.
    names = {"conv": "conv1", "norm": "bn1"}
    with with_message("no variable takes 'fc.weight'; no variable takes 'fc.bias'"):
        convert(state_dict(), names, kept=["head"])
    assert_same(convert(state_dict(), names, kept=["head"], unused=["fc"]), result)


def test_a_square_transposed_kernel_has_to_be_told():
    variables = {"params": {"ConvTranspose_0": {"kernel": jnp.ones((3, 3, 4, 4))}}}
    entries = {"up.weight": np.arange(144.0, dtype=np.float32).reshape(4, 4, 3, 3)}
    names = {"ConvTranspose_0": "up"}
    with with_message(
        "ConvTranspose_0/kernel takes as many features as it returns, so its shape does not show "
        "its layout: pass transpose_kernel={'ConvTranspose_0': ...}, with the value that the layer "
        "has"
    ):
        convert(entries, names, variables)
    with raises(ValueError, "transpose_kernel has 'up', which is not a layer with a kernel."):
        convert(entries, names, variables, transpose_kernel={"up": True})
    found = {
        value: convert(entries, names, variables, transpose_kernel={"ConvTranspose_0": value})
        for value in (False, True)
    }
    with pytest.raises(AssertionError):
        assert_same(found[False], found[True])


def test_exchanged_kernels_of_an_autoencoder_are_not_taken_for_transposed_ones():
    shapes = {"encoder": (3, 3, 2, 4), "decoder": (3, 3, 4, 2)}
    variables = {"params": {name: {"kernel": jnp.ones(s)} for name, s in shapes.items()}}
    values = {"a.weight": np.ones((4, 2, 3, 3)), "b.weight": np.ones((2, 4, 3, 3))}
    problem = (
        "{!r} has shape {}, {} in Flax's layout, but {}/kernel has shape {} (if {!r} is a "
        "ConvTranspose, pass transpose_kernel={{{!r}: False}})"
    )
    encoder = ("b.weight", (2, 4, 3, 3), (3, 3, 4, 2), "encoder", shapes["encoder"])
    decoder = ("a.weight", (4, 2, 3, 3), (3, 3, 2, 4), "decoder", shapes["decoder"])
    problems = [problem.format(*case, case[3], case[3]) for case in (encoder, decoder)]
    with with_message("; ".join(problems)):
        convert(values, {"encoder": "b", "decoder": "a"}, variables)
    result = convert(values, {"encoder": "a", "decoder": "b"}, variables)
    assert jax.tree.map(jnp.shape, result["params"]) == {
        k: {"kernel": s} for k, s in shapes.items()
    }


def test_an_nnx_model_is_unchanged_after_an_error():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    entries = {"0.weight": np.ones((2, 2), np.float32), "0.bias": np.ones(2, np.float32)}
    with with_message("names lacks 'layers/1' (bias, kernel)"):
        load_torch(model, entries, {"layers/0": "0"})
    assert_same(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model))), before)


def test_other_layouts_of_linear_layers():
    """Attentions split features, and a convolution with a window of one value is linear."""
    kernels = {"query": (6, 2, 3), "out": (2, 3, 6), "point": (1, 1, 6, 4), "dense": (6, 4)}
    variables = {"params": {name: {"kernel": jnp.ones(s)} for name, s in kernels.items()}}
    variables["params"]["query"]["bias"] = jnp.ones((2, 3))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(6, 6)).astype(np.float32) for name in ("query", "out")}
    weights["point"] = rng.normal(size=(4, 6)).astype(np.float32)
    entries = {f"{name}.weight": value for name, value in weights.items()}
    entries["query.bias"] = np.arange(6.0, dtype=np.float32)
    entries["dense.weight"] = weights["point"][:, :, None, None]
    x = rng.normal(size=(5, 6)).astype(np.float32)
    result = convert(entries, {name: name for name in kernels}, variables)
    params = result["params"]
    heads = nn.DenseGeneral((2, 3)).apply({"params": params["query"]}, x)
    assert_close(heads.reshape(5, 6), x @ weights["query"].T + np.arange(6.0, dtype=np.float32))
    out = nn.DenseGeneral(6, axis=(-2, -1), use_bias=False).apply({"params": params["out"]}, heads)
    assert_close(out, heads.reshape(5, 6) @ weights["out"].T)
    for name in ("point", "dense"):
        assert_close(x @ params[name]["kernel"].reshape(6, 4), x @ weights["point"].T)


def test_an_embedding():
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    variables = {"params": {"embed": {"embedding": jnp.ones((4, 3))}}}
    result = convert({"wte.weight": weight}, {"embed": "wte"}, variables)
    np.testing.assert_array_equal(result["params"]["embed"]["embedding"], weight)


def assert_close(ours, theirs):
    # Sums of six products of order one, each rounded a few times.
    assert np.abs(ours - theirs).max() <= 12 * np.finfo(np.float32).eps * np.abs(theirs).max()


def test_wrong_types():
    with raises(TypeError, "state_dict must be a mapping, got list."):
        convert([])
    with raises(TypeError, "state_dict must have strings as keys, got 1."):
        convert({1: 2})
    with raises(TypeError, "names must be a mapping, got list."):
        convert(state_dict(), [])
    with raises(TypeError, "variables must be a mapping, got int."):
        convert(state_dict(), variables=3)
    with raises(TypeError, "unused must be a collection of strings, got 'aux'."):
        convert(state_dict(), unused="aux")
    with raises(
        ValueError,
        "flattened['head'] must be the sizes of the features before they are flattened, such as "
        "(channels, height, width), got 4.",
    ):
        convert(state_dict(), flattened={"head": 4})
    with raises(TypeError, "model must be a flax.nnx.Module, got dict."):
        load_torch({}, state_dict(), NAMES)
