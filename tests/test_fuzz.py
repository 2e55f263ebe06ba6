"""Random arguments of `batch_norm` give a result or a documented error."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxbn

# Most examples compile something.
fuzz = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

FLOATS = st.sampled_from(["float32", "bfloat16", "float16"])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool", "complex64"])
SIZES = st.lists(st.integers(0, 3), min_size=0, max_size=3).map(tuple)
ODD = st.sampled_from(
    [
        *(None, "x", True, (), [], {}, 1, -7, 3.5, float("nan"), object()),
        *(1e300, 10**400, np.float64(0.5), ("i", "i")),
        *(0.0, -1e-5, 1.5, "unbiased", [[0, 1], [2]], ("i", "j"), jnp.ones(2), jnp.ones((2, 2))),
        *({"mean": jnp.ones(2)}, {"scale": jnp.ones(2), "gamma": 1}, {"scale": 3}),
    ]
)


@st.composite
def arrays(draw, shapes=SIZES, dtypes=DTYPES):
    shape, dtype = draw(shapes), draw(dtypes)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    # Finite, of any size that squares do not overflow, now and then constant.
    offset, deviation = draw(st.sampled_from([0, 1, 1e4])), draw(st.sampled_from([0, 1, 1e-3, 1e4]))
    return jnp.asarray(offset + deviation * rng.normal(size=shape)).astype(dtype)


@st.composite
def calls(draw):
    """Draw a valid call, and replace up to two of its arguments by something odd."""
    shape = draw(st.sampled_from([(4, 2), (2, 3, 2), (1, 2), (0, 2), (3,), (2, 2, 2, 1)]))
    axis = draw(st.sampled_from([-1, 0, len(shape) - 1, (-1,)]))
    params, state = jaxbn.init(shape, axis, track_count=True)
    estimators = st.sampled_from(["biased", "unbiased"])
    masks = arrays(st.tuples(*(st.sampled_from([1, n]) for n in shape)), st.just("bool"))
    call = {
        "params": params,
        "state": draw(st.sampled_from([state, None])),
        "x": draw(arrays(st.just(shape), FLOATS)),
        "train": draw(st.booleans()),
        "axis": axis,
        "momentum": draw(st.sampled_from([0.9, 0, 1, None, 0.5])),
        "epsilon": draw(st.sampled_from([1e-5, 1e-3, 1e-12])),
        "batch_variance": draw(estimators),
        "running_variance": draw(estimators),
        "axis_name": None,
        "axis_index_groups": None,
        "mask": draw(st.one_of(st.none(), masks)),
        "dtype": draw(st.sampled_from([None, jnp.float32, jnp.bfloat16])),
        "virtual_batch_size": draw(st.sampled_from([None, None, 1, 2, 3])),
    }
    for name in draw(st.lists(st.sampled_from(list(call)), max_size=2)):
        call[name] = draw(st.one_of(ODD, arrays()))
    return call


def is_finite(tree):
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(tree))


def test_a_result_or_a_documented_error():
    outcomes = {"result": 0, "error": 0}

    @fuzz
    @given(calls())
    def run(call):
        try:
            y, new = jaxbn.batch_norm(**call)
        except (ValueError, TypeError) as error:
            outcomes["error"] += 1
            # It is one of ours, which name the argument, and not one from deep within JAX.
            name = re.match(r"[a-z_]+", str(error))
            assert name and name[0] in call, str(error)
            assert re.search(
                r" (must|may|does not|is not|is out|names|has|are groups)\b", str(error)
            )
            return
        outcomes["result"] += 1
        params, state, x = call["params"], call["state"], call["x"]
        assert y.shape == x.shape
        assert y.dtype == (call["dtype"] or x.dtype)
        assert (new is None) == (state is None)
        if is_finite((x, params, state)):
            assert is_finite((y, new)), "finite input gave inf or NaN"

    run()
    assert min(outcomes.values()) >= 20, outcomes


# One function for all examples, so that few of them compile.
@partial(jax.jit, static_argnames=("estimator", "size"))
def gradients(x, params, mask, estimator, size):
    def loss(x, params):
        y, _ = jaxbn.batch_norm(
            params,
            None,
            x,
            True,
            mask=mask,
            batch_variance=estimator,
            running_variance=estimator,
            virtual_batch_size=size,
        )
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.grad(loss, (0, 1))(x, params)


@fuzz
@given(st.data())
def test_gradients_of_finite_input_are_finite(data):
    shape = data.draw(st.sampled_from([(4, 2), (3, 2, 2), (1, 2)]))
    x = data.draw(arrays(st.just(shape), FLOATS))
    mask = data.draw(st.one_of(st.none(), arrays(st.just(shape), st.just("bool"))))
    estimator = data.draw(st.sampled_from(["biased", "unbiased"])) if shape[0] > 1 else "biased"
    size = data.draw(st.sampled_from([None, 2, shape[0]]))
    params, _ = jaxbn.init(shape)
    assert is_finite(gradients(x, params, mask, estimator, size))
