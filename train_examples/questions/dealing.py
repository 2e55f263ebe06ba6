"""How well test batches are classified with their own statistics."""

import jax
import jax.numpy as jnp
import numpy as np

from train_examples.digits.train import TrainState
from train_examples.questions import common

MIXED_SIZE = 20
BATCHES_PER_CLASS = 8


@jax.jit
def predict(state: TrainState, batches: jax.Array) -> jax.Array:
    """Return the predicted classes of several batches, each normalized by its own statistics."""
    return jnp.argmax(jax.vmap(common.batch_logits, (None, 0))(state, batches), -1)


def by_size(state: TrainState, size: int, seed: int) -> tuple[float, float]:
    """Score batches of one size that are normalized by their own statistics.

    The test images are split into batches at random, twice. Returns the accuracy, and the share of
    images whose predicted class differs between the two splits.
    """
    images, labels = common.digits().test_images, common.digits().test_labels
    answers = []
    for deal in range(2):
        order = np.random.default_rng([seed, deal]).permutation(len(images))
        predicted = predict(state, images[order].reshape(-1, size, *images.shape[1:]))
        answers.append(np.empty_like(labels))
        answers[-1][order] = np.ravel(predicted)
    first, second = answers
    accuracy = np.mean([first == labels, second == labels])
    return float(accuracy), float(np.mean(first != second))


def by_share(state: TrainState, share: float, seed: int) -> tuple[float, float]:
    """Score batches of `MIXED_SIZE` images in which one class has the given share.

    Returns their accuracy with their own statistics, and with the moving averages.
    """
    images, labels = common.digits().test_images, common.digits().test_labels
    rng = np.random.default_rng(seed)
    of_class = round(share * MIXED_SIZE)
    index = []
    for number in np.repeat(np.arange(10), BATCHES_PER_CLASS):
        members = rng.choice(np.flatnonzero(labels == number), of_class, replace=False)
        others = rng.choice(np.flatnonzero(labels != number), MIXED_SIZE - of_class, replace=False)
        index.append(np.concatenate([members, others]))
    index = np.array(index)
    own = np.mean(predict(state, images[index]) == labels[index])
    moving = np.argmax(common.logits(state, images), -1)[index]
    return float(own), float(np.mean(moving == labels[index]))
