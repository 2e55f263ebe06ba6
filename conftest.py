import ctypes
import gc
import os
import sys
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Read when JAX first looks for devices, so before any test.
jax.config.update("jax_num_cpu_devices", 8)
# Read when PyTorch and Keras are first imported. Each of pytest's processes has a core to itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "jax")

HAIKU = "Haiku promotes the count of its moving averages."
FLAX = "Flax promotes inputs of other dtypes than the parameters'."
KERAS = "Keras adds a bias of shape (C,) to a batch."
OPTAX = "Optax promotes the count of its steps."
EXAMPLES = "The examples train with Optax, and take inputs of other dtypes than the parameters'."
# Modules, of tests or of doctests, in which a framework promotes, and what it promotes.
PROMOTING = {
    **dict.fromkeys(("haiku", "test_adapters", "test_convert"), HAIKU),
    **dict.fromkeys(("test_parity_command", "test_parity_frameworks"), HAIKU),
    **dict.fromkeys(("test_calibrate", "test_calibrate_nnx", "test_fold_linen"), FLAX),
    "test_load_torch": FLAX,
    **dict.fromkeys(("test_fold_nnx", "test_fold_traced"), FLAX),
    **dict.fromkeys(("_fold", "test_fold"), "Users add a bias of shape (C,) to a batch."),
    **dict.fromkeys(("accuracy", "test_compare_accuracy"), FLAX),
    "test_compare_models_frameworks": KERAS,
    "test_decay_mask": OPTAX,
    **dict.fromkeys(("test_data_parallel", "test_digits", "test_digits_teaching"), EXAMPLES),
    **dict.fromkeys(("test_digits_storage", "test_data_parallel_runs"), EXAMPLES),
    **dict.fromkeys(("test_fold_example", "test_hear_pitch"), EXAMPLES),
    "test_port_efficientnet": EXAMPLES,
    **dict.fromkeys(("test_questions", "test_recalibrate_example", "test_reliability"), EXAMPLES),
    **dict.fromkeys(("test_small_batches", "test_torch_twin"), EXAMPLES),
}


class WithoutTorch:
    """A finder that skips the test, or the module of tests, that imports PyTorch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            pytest.skip("imports PyTorch", allow_module_level=True)


def pytest_addoption(parser):
    parser.addoption(
        "--without-torch", action="store_true", help="skip, and list, the tests that need PyTorch"
    )


def pytest_configure(config):
    if config.getoption("--without-torch"):
        sys.meta_path.insert(0, WithoutTorch())
        config.option.reportchars += "s"
        config.option.fold_skipped = False
    share_compiled_programs(config)


def share_compiled_programs(config):
    """Compile each program once a run: pytest's processes share an initially empty cache."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    directory = tempfile.TemporaryDirectory()
    config.add_cleanup(directory.cleanup)
    options = {
        "jax_compilation_cache_dir": directory.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_finish():
    """Exempt what is imported by now from garbage collections, which would visit all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Free what JAX keeps of a module's programs. Hardly any module runs those of another."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        # The C library keeps what is freed, for later use that may not come.
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def without_compilation_cache():
    """Compile every program anew, for tests of what the compiler makes of it."""
    directory = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


def promote(dtypes, ranks):
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request):
    """Forbid promotion, since what promotes would raise in programs of users who forbid it."""
    if request.path.stem not in PROMOTING:
        promote("strict", "raise")
    yield
    promote("standard", "allow")


@pytest.fixture
def standard_promotion():
    """Promote as JAX does by default, for other frameworks' own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
