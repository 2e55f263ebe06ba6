import os

import jax
import numpy as np
import pytest

# Read when JAX first looks for devices, so before any test.
jax.config.update("jax_num_cpu_devices", 8)
# Read when Keras is first imported.
os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
