"""The benchmarks compute right ratios, compare equal forms, and write their reports."""

import itertools
import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    collectives,
    contenders,
    forms,
    memory,
    plots,
    recompute,
    report,
    scaling,
    speed,
    timing,
    training_step,
)
from benchmarks.contenders import Problem
from benchmarks.settings import Settings
from tests import oracle

MAKERS, MISSING = contenders.available()


def test_turns():
    now, log = [0.0], []

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            now[0] += seconds

        return run

    calls = {"a": call("a", 1.0), "b": call("b", 2.0), "c": call("c", 4.0)}
    times = timing.turn_by_turn(calls, at_least=3, at_most=100, seconds=34.5, clock=lambda: now[0])
    # Seven seconds a round: the fifth ends at 35.
    assert times == {"a": [1.0] * 5, "b": [2.0] * 5, "c": [4.0] * 5}
    rounds = ["".join(log[k : k + 3]) for k in range(0, len(log), 3)]
    assert rounds == ["abc", "abc", "cba", "bca", "acb", "cab"]
    for at_least, at_most, count in [(7, 31, 7), (1, 2, 2)]:
        times = timing.turn_by_turn(
            calls, at_least=at_least, at_most=at_most, seconds=8, clock=lambda: now[0]
        )
        assert len(times["a"]) == count


def test_orders_give_everybody_every_place_and_no_fixed_neighbour():
    names = ["a", "b", "c", "d"]
    orders = [timing.order(names, k) for k in range(8)]
    for place in range(4):
        assert sorted(one[place] for one in orders) == sorted(names * 2)
    for one, other in itertools.permutations(names, 2):
        follows = sum(o.index(other) == o.index(one) + 1 for o in orders)
        assert follows <= 4


def test_ratios():
    ours, theirs, copies = [1.0, 2.0, 30.0], [2.0, 2.0, 20.0], [0.25, 0.5, 6.0]
    # Of pairs: 0.5, 1 and 1.5; the ratio of the medians is 1 too, but that of means is not.
    assert timing.median_ratio(ours, theirs) == 1
    assert timing.median_ratio([3.0, 1.0, 1.0], [1.0, 1.0, 2.0]) == 1
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2)
    # A copy is two passes: 1.5, 4 and 1 of them are the floors. It takes 1/4, 1/4 and 1/5 of ours.
    assert timing.floor_fraction(ours, copies, "forward") == 1.5 / 4
    assert timing.floor_fraction(ours, copies, "forward_backward") == 1
    assert timing.floor_fraction(ours, copies, "evaluate") == 1 / 4


def test_the_summary_is_of_shapes():
    case = {
        **{"data": "settled", "layout": "NHWC", "dtype": "float32"},
        **{"pass": "forward", "contender": "Flax"},
    }
    ratios = [(0.5, None), (2.0, 0.2), (1.0, 0.8)]
    records = [{**case, "ours_over_it": ratio, "of_floor": floor} for ratio, floor in ratios]
    records.append({**case, "layout": "NCHW", "ours_over_it": 3.0, "of_floor": None})
    records.append({**case, "data": "far", "ours_over_it": 5.0, "of_floor": None})
    first, second, third = speed.summarize(records)
    assert (first["layout"], first["shapes"], second["layout"]) == ("NHWC", 3, "NCHW")
    assert first["ours_over_it"] == pytest.approx(1)
    assert first["of_floor"] == pytest.approx(0.4)
    assert (second["ours_over_it"], second["of_floor"]) == (pytest.approx(3), None)
    assert (third["data"], third["ours_over_it"]) == ("far", pytest.approx(5))


def test_problems_are_every_shape_type_and_layout():
    problems = speed.problems(speed.SHAPES)
    assert len(speed.SHAPES) == 8
    assert len(problems) == len(set(problems)) == 2 * (2 * 7 + 1)
    assert ("NCHW", Problem((32, 64, 56, 56), 1, "bfloat16")) in problems
    assert ("NHWC", Problem((32, 112, 112, 64), -1, "float32")) in problems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_returns_every_bit(dtype):
    x = jnp.arange(-8, 8, dtype=dtype)
    copied = ~np.asarray(speed.copy(x))
    np.testing.assert_array_equal(copied.view(x.dtype), x)


def test_kept_bytes_are_those_of_the_input_and_a_few_features():
    problem = Problem((64, 4, 4, 8), -1, "bfloat16")
    per_feature = 4 * 8
    kept = memory.kept_bytes("ours", problem)
    assert 2 * math.prod(problem.shape) <= kept <= 2 * math.prod(problem.shape) + 10 * per_feature


@pytest.mark.usefixtures("standard_promotion")
def test_speed_of_one_shape(monkeypatch, tmp_path):
    """Every contender is timed in every pass and reported. The times are not asserted."""
    monkeypatch.setattr(
        speed, "problems", lambda shapes: [("NHWC", Problem((32, 4), -1, "float32"))]
    )
    names = ("settled", "fresh")
    data = speed.measure(Settings(quick=True, data=names))
    assert len(data["cases"]) == len(data["summary"]) == 2 * 3 * len(MAKERS)
    assert all(one["seconds"] > 0 and one["ours_over_it"] > 0 for one in data["cases"])
    assert all(one["ours_over_it"] == 1 for one in data["cases"] if one["contender"] == "ours")
    text = report.speed(data)
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("- ")] == [
        f"- {name}" for name in names
    ]
    for name in names:
        assert text.count(f"| {name} | (32, 4) | float32 | NHWC |") == 3
        assert f"| training, forward | {name} | float32 | NHWC | 1 |" in text
    plots.speed(data, tmp_path / "speed.png")


def test_sections_that_count_and_train():
    data = collectives.measure(Settings())
    assert [one["devices"] for one in data["cases"]] == [2, 4, 8]
    assert "| 2 | 1 | 2,048 | 1 | 512 |" in report.collectives(data)
    assert training_step.setup(False, on_cpu=True)[1] == (32, 32, 32, 3)
    assert training_step.setup(False, on_cpu=False)[1] == (64, 224, 224, 3)
    data = training_step.measure(Settings(quick=True))
    (row,) = data["cases"]
    assert row["ours_over_flax"] > 0
    assert f"| {row['norms_off_zero']} of 3 |" in report.training_step(data)


def test_recomputing_changes_what_is_kept_and_not_the_gradients():
    given = recompute.arguments((4, 8, 8, 8), 3, "float32")
    results = [recompute.training_step(chain)(*given) for chain in recompute.CHAINS.values()]
    for found in results[1:]:
        # The same arithmetic, which the compiler may fuse otherwise: roundings of float32.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
            *(found, results[0]),
        )
    data = recompute.measure(Settings(quick=True))
    assert [one["kept"] for one in data["cases"]] == 2 * list(recompute.CHAINS)
    assert all(one["temporary_bytes"] > 0 and one["over_all"] > 0 for one in data["cases"])
    assert report.recompute(data).count("| all (no checkpoint) |") == 2


def test_forms_of_one_thing_agree():
    x = 3 + jax.random.normal(jax.random.key(0), (4, 6, 6, 8))
    shift = jnp.full((1, 1, 1, 8), 2.5)
    long = np.asarray(x, np.longdouble)

    def run(name: str, shift: jax.Array):
        return forms.compiled(forms.FORMS[name], x, shift)(x, shift)

    sums = [name for name in forms.FORMS if name.startswith("sums")]
    moments = [name for name in forms.FORMS if name.startswith("moments")]
    assert (len(sums), len(moments)) == (6, 3)
    for name in sums:
        deviation = long - (0 if "zero" in name else 2.5)
        for found, terms in zip(run(name, shift), (deviation, deviation**2), strict=True):
            wanted = terms.sum(forms.AXES, keepdims=True)
            # 144 roundings of partial sums at most.
            atol = 144 * 2.0**-24 * np.abs(terms).sum(forms.AXES).max()
            np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
    for name in moments:
        found = run(name, shift)
        wanted = long.mean(forms.AXES, keepdims=True), long.var(forms.AXES, keepdims=True)
        # The bound that the layer keeps on any data.
        assert oracle.error(found.mean, wanted[0]) <= 1e-6
        assert oracle.error(found.var, wanted[1]) <= 1e-6
    text = report.forms(forms.measure(Settings(quick=True)))
    for name in forms.FORMS:
        assert text.count(f"| {name} |") == 2


@pytest.mark.usefixtures("without_compilation_cache")
def test_forms_of_moments_differ_by_platform():
    x, shift = jnp.ones((4, 6, 6, 8)), jnp.zeros((1, 1, 1, 8))
    texts = {
        name: str(forms.compiled(form, x, shift).as_text()) for name, form in forms.FORMS.items()
    }
    loops = {name for name, text in texts.items() if " while(" in text}
    assert loops == {"moments in two readings, with the loop (in use on a CPU)"}


def test_the_model_of_collectives():
    # Four rounds among 16; each device lacks 15/16 of the table, which an all-gather brings, and an
    # all-reduce is two of them.
    assert scaling.all_gather_seconds(32.0, 16, latency=3.0, bandwidth=2.0) == 4 * 3 + 15
    assert scaling.all_reduce_seconds(32.0, 16, latency=3.0, bandwidth=2.0) == 2 * (4 * 3 + 15)
    table, sums = scaling.table_seconds, scaling.sums_seconds
    assert scaling.step_seconds(16, 1.0, np.inf, table) == (1 + 2) * 4 * 53
    assert scaling.step_seconds(16, 1.0, np.inf, sums) == (2 + 2) * 4 * 53
    backward = 2 * scaling.backward_bytes(26_560)
    for seconds, forward in [
        (table, scaling.table_bytes(16, 26_560)),
        (sums, 2 * scaling.sums_bytes(26_560)),
    ]:
        found = scaling.step_seconds(16, latency=0.0, bandwidth=1.0, forward=seconds)
        assert found == pytest.approx((forward + backward) * 15 / 16)


@pytest.mark.usefixtures("standard_promotion")
def test_the_command(tmp_path, capsys):
    command.main(["--quick", "--only", "accuracy", "--only", "memory", "--out", str(tmp_path)])
    results = json.loads(
        (tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert list(results["sections"]) == ["memory", "accuracy"]
    errors = results["sections"]["accuracy"]["errors"]
    assert len(errors) == 9
    assert results["sections"]["accuracy"]["shapes"]["N(1e7, 1), many values"] == [1_000_000, 2]
    for of_input in errors.values():
        assert list(of_input) == list(MAKERS)
        assert max(of_input["ours"].values()) <= 1e-6
    markdown = (tmp_path / "results.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "python -m benchmarks --quick --only accuracy --only memory" in markdown
    for line in markdown.splitlines():
        assert "None" not in line and not line.endswith(" ")
    for name in ("memory", "accuracy"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "speed,spead"])
    assert "spead: the sections are speed, memory, accuracy" in capsys.readouterr().err


def test_it_starts_again_only_where_something_is_missing(monkeypatch):
    started = []
    monkeypatch.setattr(command.os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(command.sys, "platform", "linux")
    monkeypatch.setattr(command.sys, "argv", ["benchmarks", "--quick"])
    for name, value in command.QUIET.items():
        monkeypatch.setenv(name, value)
    command.run_quietly()
    assert not started
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # what somebody chose stays
    monkeypatch.delenv("MALLOC_TOP_PAD_")
    command.run_quietly()
    ((_, argv, environment),) = started
    assert argv[1:] == ["-m", "benchmarks", "--quick"]
    assert environment["MALLOC_TOP_PAD_"] == command.QUIET["MALLOC_TOP_PAD_"]
    assert environment["OMP_WAIT_POLICY"] == "active"
