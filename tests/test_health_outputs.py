"""`check` compares the outputs of a network with running and with exact statistics."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from jaxbn.health import check
from tests.health import exact, shuffled


def shared(norm, x):
    layer = norm(name="shared")
    return layer(x), layer(4 * x + 3)


class SharedNNX(nnx.Module):
    def __init__(self):
        self.shared = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return shared(lambda name: self.shared, x)


SHARED = (
    "With running instead of exact statistics, the network's output changes by {} standard "
    "deviations (RMS), although no layer's statistics are far off. Inputs with different "
    "statistics share a layer, and its running statistics fit none of them: shared. Training "
    "normalizes each call separately. Use a separate layer for each call."
)


@pytest.mark.parametrize("train", [False, True])
def test_a_layer_that_inputs_with_different_statistics_share(train):
    model, variables = exact(shared, shuffled(), train)
    linen = check(model, variables, shuffled())
    model = SharedNNX()
    if not train:
        model.eval()
    nnx.update(model, recalibrate(model, nnx.state(model), shuffled()))
    for report in (linen, check(model, None, shuffled())):
        (finding,) = report.findings
        assert finding == ("", "eval-differs", SHARED.format(f"{report.output_change:.2g}"))
        # Means that differ by more than their deviations change outputs by about those.
        assert report.output_change is not None and report.output_change > 0.5
        assert report.layers[0].change < 1e-5


def test_a_layer_that_inputs_with_equal_statistics_share():
    def function(norm, x):
        layer = norm()
        return layer(x) + 2 * layer(2 * x.mean(0, keepdims=True) - x)

    x = shuffled(64, batches=1)
    assert check(*exact(function, x), x).ok


def test_a_network_that_amplifies_small_changes():
    """Means of 400 normalized values have 1/20 of their deviation, but all of a shift."""
    x = np.random.default_rng(0).normal(size=(64, 400, 4)).astype("float32")
    model, variables = exact(lambda norm, x: norm()(x).mean(1), [x])
    variables["batch_stats"]["BatchNorm_0"]["mean"] += 0.2
    report = check(model, variables, [x])
    (finding,) = report.findings
    assert finding[:2] == ("", "eval-differs")
    assert "the network amplifies them." in finding.text
    assert report.output_change == pytest.approx(0.2 * 20, rel=0.2)
    assert report.layers[0].change == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize(
    "outputs, changes",
    [
        (lambda y: (y > 0, y.shape[0]), None),
        (lambda y: {"mask": jnp.where(y > 0, -jnp.inf, 0.0), "y": y}, 0.5),
        (lambda y: (y, 0 * y), 0.5),
        (lambda y: jnp.asarray(y, jnp.bfloat16), 0.5),
    ],
)
def test_outputs_of_any_form(outputs, changes):
    """The running deviation is twice that of the data, so the outputs are half of the exact."""
    model, variables = exact(lambda norm, x: outputs(norm(epsilon=0)(x)), shuffled())
    variables["batch_stats"]["BatchNorm_0"]["var"] *= 4
    change = check(model, variables, shuffled()).output_change
    assert change == (None if changes is None else pytest.approx(changes, rel=1e-5))


def test_the_change_of_a_number_is_relative_to_its_magnitude():
    model, variables = exact(
        lambda norm, x: (norm(epsilon=0)(x) ** 2).mean(), shuffled(64, batches=1)
    )
    variables["batch_stats"]["BatchNorm_0"]["var"] *= 2
    report = check(model, variables, shuffled(64, batches=1))
    assert report.output_change == pytest.approx(0.5, rel=1e-5)


def deep(norm, x):
    for i in range(10):
        x = norm(name=f"norm_{i}")(x)
    return x


def off_by(change, layers):
    """Return a report on ten layers of which the first ones are off in the mean by `change`."""
    x = shuffled(640, batches=1)
    model, variables = exact(deep, x)
    for i in range(layers):
        variables["batch_stats"][f"norm_{i}"]["mean"] += (
            change * variables["batch_stats"][f"norm_{i}"]["var"] ** 0.5
        )
    return check(model, variables, x)


def test_small_errors_of_many_layers_add_up():
    """Each layer shifts the output by 0.3 deviations, and none of them is off."""
    report = off_by(0.3, layers=10)
    (finding,) = report.findings
    assert finding[:2] == ("", "eval-differs")
    assert "Small errors add up over the layers" in finding.text
    assert report.output_change == pytest.approx(3.0, rel=0.01)


def test_what_the_layers_explain_is_no_finding():
    """The output moves by 0.6, more than the threshold, and the two layers by as much together."""
    report = off_by(0.3, layers=2)
    assert report.ok and report.output_change == pytest.approx(0.6, rel=0.01)
    assert str(report).endswith(
        "No faults were found. jaxbn.calibrate.recalibrate would remove this change of the output."
    )


def test_a_loss_for_each_batch_is_compared_with_its_size():
    """Losses of batches are nearly equal, so that a small change is many of their deviations."""

    def function(norm, x):
        return (norm()(x) ** 2).mean()

    x = shuffled(640, batches=10)
    model, variables = exact(function, x)
    variables["batch_stats"]["BatchNorm_0"]["var"] *= 1.1
    report = check(model, variables, x)
    # The mean square falls from 1 to 1 / 1.1.
    assert report.ok and report.output_change == pytest.approx(1 - 1 / 1.1, rel=0.05)
