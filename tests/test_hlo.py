"""Counts of compiled programs are right on small programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo
from benchmarks.hlo import Collective, Counts

pytestmark = pytest.mark.usefixtures("without_compilation_cache")

# `whole` is read in full (4,096 bytes) and `part` in two slices (64 and 128 bytes, the second
# behind a bitcast); the result has 64 bytes. The copy after it reads and writes these 64.
FUSION = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[32,32]{1,0})->f32[16]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p.0: f32[32,32], p.1: f32[32,32]) -> f32[16] {
  %p.1 = f32[32,32]{1,0:T(8,128)} parameter(1)
  %p.0 = f32[32,32]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %flat = f32[1024]{0} bitcast(%p.1)
  %first = f32[1,16]{1,0} slice(%p.1), slice={[0:1], [0:16]}
  %second = f32[32]{0} dynamic-slice(%flat, %zero), dynamic_slice_sizes={32}
  %sums = f32[32]{0} reduce(%p.0, %zero), dimensions={0}, to_apply=%add
  ROOT %out = f32[16]{0} custom-fusion-op(%sums, %first, %second)
}

ENTRY %main.7 (whole: f32[32,32], part: f32[32,32]) -> f32[16] {
  %whole = f32[32,32]{1,0:T(8,128)} parameter(0), metadata={op_name="whole(x)"}
  %part = f32[32,32]{1,0:T(8,128)} parameter(1)
  %fusion = f32[16]{0} fusion(%whole, %part), kind=kLoop, calls=%fused, metadata={op_name="f(g)"}
  %view = f32[4,4]{1,0} bitcast(%fusion)
  ROOT %copy = f32[4,4]{0,1} copy(%view)
}
"""

# The loop runs a negation of 32 bytes and a comparison of two scalars; the branches a negation and
# a copy. The entry copies once (64 bytes), and the `call` negates (64 bytes).
CONTROL = """\
HloModule jit_control

%body (state: f32[8]) -> f32[8] {
  %state = f32[8]{0} parameter(0)
  ROOT %next = f32[8]{0} negate(%state)
}

%condition (state.1: f32[8]) -> pred[] {
  %state.1 = f32[8]{0} parameter(0)
  %limit = f32[] constant(3)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}

%yes (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %negated = f32[8]{0} negate(%y)
}

%no (n: f32[8]) -> f32[8] {
  %n = f32[8]{0} parameter(0)
  ROOT %copied = f32[8]{0} copy(%n)
}

%called (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %negative = f32[8]{0} negate(%c)
}

ENTRY %main (x: f32[8], p: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %p = pred[] parameter(1)
  %start = f32[8]{0} copy(%x)
  %loop = f32[8]{0} while(%start), condition=%condition, body=%body, backend_config={"n":"3"}
  %branch = f32[8]{0} conditional(%p, %loop, %loop), branch_computations={%yes, %no}
  ROOT %end = f32[8]{0} call(%branch), to_apply=%called
}
"""

COLLECTIVES = """\
HloModule jit_collectives

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_all_reduce (f: bf16[64]) -> bf16[64] {
  %f = bf16[64]{0} parameter(0)
  ROOT %inside = bf16[64]{0} all-reduce(%f), channel_id=5, to_apply=%add
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0:T(128)S(1)} parameter(0)
  %both = (f32[64]{0:T(128)S(1)}, /*index=1*/f32[]) all-reduce(%x, %x), to_apply=%add
  %start = f32[64]{0:T(128)} all-reduce-start(%x), channel_id=2, to_apply=%add
  %done = f32[64]{0:T(128)} all-reduce-done(%start)
  %gather = (f32[64]{0:T(8,128)}, f32[4,64]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}
  %gathered = f32[4,64]{1,0:T(8,128)} all-gather-done(%gather)
  %permute = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%x)
  %permuted = f32[64]{0} collective-permute-done(%permute)
  %fusion = bf16[64]{0} fusion(%x), kind=kCustom, calls=%fused_all_reduce
  ROOT %result = f32[64]{0} copy(%x), metadata={op_name="all-reduce(x)"}
}
"""


@pytest.mark.parametrize(
    ("shape", "bytes_"),
    [
        ("f32[3,4]{1,0:T(8,128)S(1)}", 48),
        ("bf16[]", 2),
        ("pred[5]", 5),
        ("s4[3]", 2),
        ("f8e4m3fn[7]{0}", 7),
        ("c64[2]", 16),
        ("token[]", 0),
        ("f32[0,8]", 0),
        ("(f32[2]{0}, /*index=1*/(u8[3], s64[]))", 19),
    ],
)
def test_bytes_of_a_shape(shape, bytes_):
    assert hlo.array_bytes(shape) == bytes_


def test_a_fusion_reads_of_an_operand_the_slices_that_it_takes():
    assert hlo.count(FUSION) == Counts(
        bytes=(4096 + 64 + 128 + 64) + (64 + 64), kernels=2, loops=0, branches=0, loop_bytes=0
    )


def test_a_fusion_that_also_reads_an_operand_in_full_reads_it_once():
    text = FUSION.replace("(%sums, %first, %second)", "(%sums, %first, %second, %p.1)")
    assert hlo.count(text).bytes == (4096 + 4096 + 64) + (64 + 64)


def test_slices_that_overlap_are_no_more_than_the_operand():
    text = FUSION.replace("f32[1,16]{1,0} slice", "f32[32,32]{1,0} slice")
    assert hlo.count(text).bytes == (4096 + 4096 + 64) + (64 + 64)


def test_a_slice_alone_reads_what_it_returns():
    text = FUSION.replace("f32[16]{0} fusion(%whole, %part)", "f32[16]{0} slice(%part)")
    assert hlo.count(text).bytes == (64 + 64) + (64 + 64)


def test_workspace_of_a_library_is_not_counted():
    text = FUSION.replace(
        "f32[16]{0} fusion(%whole, %part)", "(f32[16]{0}, u8[999]{0}) custom-call(%whole, %part)"
    )
    assert hlo.count(text).bytes == (4096 + 4096 + 64) + (64 + 64)


def test_loops_and_branches_are_counted_apart():
    assert hlo.count(CONTROL) == Counts(
        bytes=64 + 64, kernels=2, loops=1, branches=1, loop_bytes=64 + (4 + 4 + 1) + 64 + 64
    )


def test_branches_of_a_predicate_in_the_older_form():
    text = CONTROL.replace(
        "branch_computations={%yes, %no}", "true_computation=%yes, false_computation=%no"
    )
    assert hlo.count(text) == hlo.count(CONTROL)


def test_a_loop_in_a_loop_is_seen():
    text = CONTROL.replace(
        "ROOT %negated = f32[8]{0} negate(%y)",
        "ROOT %inner = f32[8]{0} while(%y), condition=%condition, body=%body",
    )
    assert (hlo.count(text).loops, hlo.count(text).branches) == (2, 1)


def test_collectives():
    assert hlo.collectives(COLLECTIVES) == [
        Collective("all-reduce", 2 * 64),
        Collective("all-reduce", 4 * 64 + 4),
        Collective("all-reduce", 4 * 64),
        Collective("all-gather", 4 * 4 * 64),
        Collective("collective-permute", 4 * 64),
    ]


def test_a_start_and_its_end_are_one_kernel():
    # Three pairs, one all-reduce, one fusion and one copy.
    assert hlo.count(COLLECTIVES).kernels == 6


def test_text_that_is_not_hlo_is_refused():
    with pytest.raises(ValueError) as error:
        hlo.count("module @jit_step {\n}\n")
    assert str(error.value) == "the text has no line that begins with ENTRY, so it is not HLO"


def test_programs_of_this_machine_are_understood():
    """Loops, branches and the operands of every kernel are found in what XLA prints today."""

    def function(x):
        x = jax.lax.while_loop(lambda x: x[0] < 9, lambda x: 2 * x, x)
        return jax.lax.cond(x[0] > 8, jnp.sin, jnp.exp, x)

    counts = hlo.count(jax.jit(function).lower(jnp.ones(1000)).compile().as_text())
    assert (counts.loops, counts.branches) == (1, 1)
    x = jnp.ones((64, 64))
    counts = hlo.count(jax.jit(lambda x: jnp.sin(x).T).lower(x).compile().as_text())
    assert (counts.bytes, counts.loops) == (2 * x.nbytes, 0)
