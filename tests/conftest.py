import os

import jax
import numpy as np
import pytest

# Read when JAX first looks for devices, so before any test.
jax.config.update("jax_num_cpu_devices", 8)
# Read when PyTorch and Keras are first imported. Each of pytest's processes has a core to itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "jax")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
