"""`import jaxbn` imports only what it needs, and loads the rest on demand."""

import importlib
import subprocess
import sys

import pytest

import jaxbn

SUBMODULES = ["calibrate", "convert", "health", "inference", "linen", "nnx", "parity"]


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_submodules_are_imported_where_they_are_first_asked_for():
    program = f"""
import sys, jaxbn
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & {{"flax", "optax", "torch", "matplotlib", "rich"}}))
print([name for name in {SUBMODULES} if "jaxbn." + name in sys.modules])
print(set({SUBMODULES}) <= set(dir(jaxbn)), "batch_norm" in dir(jaxbn), "flax" in sys.modules)
for name in {SUBMODULES}:
    assert getattr(jaxbn, name) is sys.modules["jaxbn." + name]
print(jaxbn.linen.BatchNorm.__name__)
"""
    assert run(program).splitlines() == ["[]", "[]", "True True False", "BatchNorm"]


@pytest.mark.parametrize("name", SUBMODULES)
def test_they_are_the_modules_that_import_gives(name):
    assert getattr(jaxbn, name) is importlib.import_module(f"jaxbn.{name}")


def test_unknown_attributes():
    with pytest.raises(AttributeError) as caught:
        jaxbn.layers  # type: ignore[attr-defined] # noqa: B018
    assert str(caught.value) == "module 'jaxbn' has no attribute 'layers'"
    assert not hasattr(jaxbn, "linnen")
    with pytest.raises(ImportError, match="cannot import name 'layers' from 'jaxbn'"):
        from jaxbn import layers  # type: ignore[attr-defined] # noqa: F401
