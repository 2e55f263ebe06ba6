"""The differences of outputs, gradients and statistics of one network in two frameworks."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from numpy.typing import DTypeLike

from train_examples.port_resnet import flax_model, torch_model
from train_examples.port_resnet.convert import size, to_flax
from train_examples.port_resnet.weights import StateDict, as_dtype

# The arrays that are compared in each row of the table, in Flax's layout.
Results = Mapping[str, list[np.ndarray]]


class Batch(NamedTuple):
    """Images, (N, height, width, 3), and the gradient of a loss with respect to their logits."""

    images: np.ndarray
    cotangent: np.ndarray

    def astype(self, dtype: DTypeLike) -> "Batch":
        """Return the batch in another dtype."""
        return Batch(self.images.astype(dtype), self.cotangent.astype(dtype))


class Comparison(NamedTuple):
    """One row of the table: the difference in float64, and the errors in float32."""

    float64_difference: float
    error_of_torch: float
    error_of_jaxbn: float


def random_batch(number: int, image_size: int, classes: int, seed: int) -> Batch:
    """Return a float64 batch of values that float32 represents exactly."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(number, image_size, image_size, 3))
    batch = Batch(images, rng.normal(size=(number, classes)))
    return batch.astype(np.float32).astype(np.float64)


def compare(state_dict: StateDict, batch: Batch) -> dict[str, Comparison]:
    """Compare both frameworks in float64, and each in float32 with PyTorch in float64."""
    theirs, ours = run_both(state_dict, batch, np.float64)
    theirs32, ours32 = run_both(state_dict, batch, np.float32)
    columns = (distances(ours, theirs), distances(theirs32, theirs), distances(ours32, theirs))
    return {row: Comparison(*(column[row] for column in columns)) for row in theirs}


def run_both(state_dict: StateDict, batch: Batch, dtype: DTypeLike) -> tuple[Results, Results]:
    """Return PyTorch's results and Flax's, computed in a dtype."""
    state_dict, batch = as_dtype(state_dict, dtype), batch.astype(dtype)
    with jax.enable_x64(True):
        model = flax_model.ResNet18(*size(state_dict))
        ours = run_flax(model, to_flax(state_dict), batch)
        return run_torch(torch_model.load(state_dict), batch), ours


def run_flax(model: flax_model.ResNet18, variables: Mapping[str, Any], batch: Batch) -> Results:
    """Return the results of an evaluation and a training step in Flax."""

    @jax.jit
    def step(variables: Mapping[str, Any], batch: Batch) -> tuple[Any, ...]:
        def logits(params: Any, images: jax.Array) -> Any:
            all_variables = {**variables, "params": params}
            return model.apply(all_variables, images, True, mutable=["batch_stats"])

        y, vjp, updates = jax.vjp(logits, variables["params"], batch.images, has_aux=True)
        evaluation = model.apply(variables, batch.images, False)
        return evaluation, y, *vjp(batch.cotangent), updates["batch_stats"]

    return _results(*step(variables, batch))


def run_torch(model: torch_model.ResNet18, batch: Batch) -> Results:
    """Return the results of an evaluation and a training step, which updates the statistics."""
    images = torch.tensor(batch.images.transpose(0, 3, 1, 2), requires_grad=True)
    with torch.no_grad():
        evaluation = model.eval()(images)
    y = model.train()(images)
    y.backward(torch.tensor(batch.cotangent))
    # Gradients under the parameters' names form a state dict, which is converted like weights.
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    after = {name: v.numpy() for name, v in {**model.state_dict(), **gradients}.items()}
    variables = to_flax(after)
    assert images.grad is not None
    images_gradient = images.grad.numpy().transpose(0, 2, 3, 1)
    logits = (evaluation.numpy(), y.detach().numpy())
    return _results(*logits, variables["params"], images_gradient, variables["batch_stats"])


def distances(values: Results, truth: Results) -> dict[str, float]:
    """Return the largest difference in each row, relative to each array's largest value."""
    return {row: distance(values[row], truth[row]) for row in truth}


def distance(values: Iterable[np.ndarray], truth: Iterable[np.ndarray]) -> float:
    """Return the largest difference between arrays, relative to each array's largest value."""

    def one(a: np.ndarray, b: np.ndarray) -> float:
        # Subtract in float64: in float32 the subtraction would round as well.
        return float(np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(b)))

    # NumPy's maximum, because Python's can ignore NaN.
    return float(np.max([one(a, b) for a, b in zip(values, truth, strict=True)]))


def _results(
    evaluation: Any, training: Any, gradients: Any, images_gradient: Any, batch_stats: Any
) -> Results:
    def leaves(tree: Any, name: str) -> list[np.ndarray]:
        flat = flatten_dict(tree)
        return [np.asarray(flat[path]) for path in sorted(flat) if path[-1] == name]

    return {
        "logits in evaluation": [np.asarray(evaluation)],
        "logits in training": [np.asarray(training)],
        "gradients by images": [np.asarray(images_gradient)],
        "gradients by kernels": leaves(gradients, "kernel"),
        "gradients by scales": leaves(gradients, "scale"),
        "gradients by biases": leaves(gradients, "bias"),
        "running means after": leaves(batch_stats, "mean"),
        "running variances after": leaves(batch_stats, "var"),
        "batches counted": leaves(batch_stats, "count"),
    }
