"""An NNX model that changes one import gets the arguments, numbers and dtypes of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._rules import FLAX_LACKS
from tests.drop_in import TOLERANCE, Block, arrays, assert_close
from tests.drop_in import X_OF_4 as X

ours, theirs = jaxbn.nnx.BatchNorm, nnx.BatchNorm


def trained(norm, x, *, mask=None, **options):
    """Return outputs and arrays of two steps and an evaluation."""
    layer = norm(x.shape[-1], **options, rngs=nnx.Rngs(0))
    results = [layer(x, mask=mask), layer(x + 1, mask=mask), arrays(layer)]
    layer.eval()
    return [*results, layer(x, mask=mask), arrays(layer)]


class TestArguments:
    def test_keywords_only(self):
        for norm in (ours, theirs):
            with pytest.raises(TypeError, match="positional argument"):
                norm(4, False, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("fast", [True, False])
    def test_option_without_effect(self, fast):
        got = trained(ours, X, use_fast_variance=fast)
        jax.tree.map(np.testing.assert_array_equal, got, trained(ours, X))
        assert_close(got, trained(theirs, X, use_fast_variance=fast))

    def test_a_batch_of_one_row_trains(self):
        assert_close(trained(ours, X[:1]), trained(theirs, X[:1]))

    def test_attributes(self):
        own = {*FLAX_LACKS, "count"}
        got, wanted = (vars(norm(4, rngs=nnx.Rngs(0))) for norm in (ours, theirs))
        assert set(got) == set(wanted) | own
        plain = [k for k, v in wanted.items() if not isinstance(v, nnx.Variable | nnx.Pytree)]
        assert {k: got[k] for k in plain if k[0] != "_"} == {
            k: wanted[k] for k in plain if k[0] != "_"
        }

    @pytest.mark.parametrize(
        ("options", "kind", "text"),
        [
            ({"axis_name": 3}, ValueError, "axis_name must be the name of a mapped axis, a tuple "
             "of them, or None, got 3."),
            ({"use_bias": "no"}, ValueError,
             "use_bias must be a Python bool, got 'no' of type str."),
            ({"promote_dtype": None}, TypeError, "promote_dtype must be a function, got None."),
        ],
        ids=lambda v: str(*v) if isinstance(v, dict) else None,
    )  # fmt: skip
    def test_are_checked(self, options, kind, text):
        with pytest.raises(kind) as raised:
            ours(4, **options, rngs=nnx.Rngs(0))
        assert str(raised.value) == text


def unchanged(values, **_):
    return values


class TestDtypes:
    @pytest.mark.usefixtures("standard_promotion")
    @pytest.mark.parametrize("promote", [None, unchanged], ids=["default", "unchanged"])
    @pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("of_input", ["bool", "int32", "bfloat16"])
    def test_are_those_of_flax(self, of_input, dtype, param_dtype, promote):
        x = jnp.asarray(X > 1 if of_input == "bool" else 4 * X, of_input)
        options = {"dtype": dtype, "param_dtype": param_dtype}
        options |= {} if promote is None else {"promote_dtype": promote}
        got, wanted = (trained(norm, x, **options) for norm in (ours, theirs))
        # Flax rounds input, statistics and each step of the arithmetic to its dtype: half a dozen
        # roundings of values up to ten.
        assert_close(got, wanted, max(TOLERANCE, 40 * float(jnp.finfo(got[0].dtype).eps)))

    def test_promotion_is_asked(self):
        seen = []

        def promote(values, *, dtype):
            seen.append(([None if v is None else (v.shape, v.dtype.name) for v in values], dtype))
            return tuple(v if v is None else v.astype("float32") for v in values)

        layer = ours(
            4,
            dtype=None,
            param_dtype="bfloat16",
            promote_dtype=promote,
            use_bias=False,
            rngs=nnx.Rngs(0),
        )
        assert layer(X.astype("bfloat16")).dtype == jnp.float32
        given = [
            ((8, 4), "bfloat16"),
            ((4,), "float32"),
            ((4,), "float32"),
            ((4,), "bfloat16"),
            None,
        ]
        assert seen == [(given, None)]

    def test_what_the_promotion_returns_is_used(self):
        def doubled(values, **_):
            x, mean, var, scale, bias = values
            return x, mean + 1, var, 2 * scale, bias

        results = [trained(norm, X, promote_dtype=doubled) for norm in (ours, theirs)]
        assert_close(*results)

    def test_narrow_dtype_rounds_only_the_result(self):
        """Far from zero, rounding the mean to bfloat16 would move it by whole deviations."""
        layer = ours(4, dtype="bfloat16", momentum=0.0, rngs=nnx.Rngs(0))
        x = 300 + X
        layer(x)
        y = layer(x, True)
        assert y.dtype == jnp.bfloat16
        # One rounding to eight bits.
        np.testing.assert_allclose(
            y.astype("float32"), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=2.0**-8, atol=1e-3
        )

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("param_dtype", ["float32", "float16"])
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_linen_and_nnx_agree_bit_by_bit(self, dtype, param_dtype, masked):
        # Whole features are masked out, too.
        mask = np.array([True, False, True, True]) if masked else None
        options = {"dtype": dtype, "param_dtype": param_dtype}
        layer = ours(4, **options, promote_dtype=unchanged, rngs=nnx.Rngs(0))
        linen = jaxbn.linen.BatchNorm(False, **options)
        variables = linen.init(jax.random.key(0), X)
        y, updates = linen.apply(variables, X, mask=mask, mutable=["batch_stats"])
        np.testing.assert_array_equal(layer(X, mask=mask), y)
        got = arrays(layer)
        jax.tree.map(
            np.testing.assert_array_equal, got, {**variables["params"], **updates["batch_stats"]}
        )


class TestMasks:
    mask = np.random.default_rng(1).random((8, 1)) < 0.6

    def test_where_it_counts(self):
        x = np.where(self.mask, X, np.nan)
        got, wanted = (trained(norm, x, mask=self.mask) for norm in (ours, theirs))
        rows = self.mask[:, 0]
        for k in (0, 1, 3):
            assert_close(got[k][rows], wanted[k][rows])
            np.testing.assert_array_equal(np.asarray(got[k])[~rows], 0)
        assert_close(got[2], wanted[2])

    @pytest.mark.parametrize("kind", ["int32", "float32"])
    def test_of_numbers(self, kind):
        """Flax's Linen layer accepts these masks, and its NNX layer refuses them."""
        got, wanted = (trained(ours, X, mask=m) for m in (self.mask.astype(kind), self.mask))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


class TestModes:
    def test_attributes_views_and_filters(self):
        model = Block(ours, nnx.Rngs(0))
        view = nnx.view(model, deterministic=True, use_running_average=True)
        assert view.bn.use_running_average and not model.bn.use_running_average
        assert view.bn.scale is model.bn.scale
        only = nnx.view(model, only=nnx.Dropout, deterministic=False)
        assert not only.bn.use_running_average
        changed = nnx.with_attributes(model, use_running_average=True)
        assert changed.bn.use_running_average and not model.bn.use_running_average
        model.set_attributes(use_running_average=True)
        assert model.bn.use_running_average
        with pytest.raises(ValueError, match=r"Unused keys found in nnx.view: \['unknown'\]"):
            nnx.view(model, use_running_average=True, unknown=True)

    def test_view_info(self):
        info = nnx.view_info(Block(ours, nnx.Rngs(0)))
        assert info.count("BatchNorm:") == 1
        assert "BatchNorm:" not in nnx.view_info(Block(ours, nnx.Rngs(0)), only=nnx.Dropout)

    def test_without_a_mode(self):
        for norm in (ours, theirs):
            layer = norm(4, use_running_average=None, rngs=nnx.Rngs(0))
            with pytest.raises(ValueError, match="use_running_average"):
                layer(X)


class TestStates:
    def test_filters_and_structure(self):
        parts = [
            nnx.split(Block(norm, nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...)[1:]
            for norm in (ours, theirs)
        ]
        assert jax.tree.structure(parts[0]) == jax.tree.structure(parts[1])
        jax.tree.map(np.testing.assert_array_equal, *(part[:2] for part in parts))

    def test_definition_does_not_hold_the_initializers(self):
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        one, other = (
            nnx.graphdef(ours(3, scale_init=f, bias_init=f, rngs=nnx.Rngs(0)))
            for f in (zeros, ones)
        )
        assert one == other and hash(one) == hash(other)

    def test_metadata(self):
        with jax.set_mesh(jax.make_mesh((1,), ("model",))):
            states = [
                nnx.state(
                    norm(
                        3,
                        scale_init=nnx.with_partitioning(nnx.initializers.ones, ("model",)),
                        bias_metadata={"out_sharding": ("model",)},
                        rngs=nnx.Rngs(0),
                    )
                )
                for norm in (ours, theirs)
            ]
        for name in ("scale", "bias"):
            got, wanted = (state[name].get_metadata() for state in states)
            assert got == wanted and got["out_sharding"] == ("model",)

    def test_numbers_in_the_representation_and_the_table(self):
        own, flax = (Block(norm, nnx.Rngs(0)) for norm in (ours, theirs))
        assert repr(own).splitlines()[0] == repr(flax).splitlines()[0]
        wide = {"width": 200}
        tables = [nnx.tabulate(m, X, console_kwargs=wide) for m in (own, flax)]
        assert "BatchNorm" in tables[0] and tables[0] == tables[1]
