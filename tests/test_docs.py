"""The public names, and the code in README and docs, are as documented."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

import jaxbn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAMES = {
    "calibrate": ["merge", "recalibrate"],
    "convert": [
        *("batch_norms_from_keras", "batch_norms_from_torch", "from_equinox", "from_haiku"),
        *("from_keras", "from_torch", "load_batch_norms", "load_torch", "put_batch_norms"),
        *("to_equinox", "to_haiku", "to_keras", "to_torch", "variables_from_torch"),
    ],
    "inference": ["find_pairs", "fold", "fold_linen", "fold_nnx"],
    "linen": ["BatchNorm", "BatchRenorm", "override"],
    "nnx": ["BatchNorm", "BatchRenorm", "override"],
    "parity": [
        *("AccuracyReport", "AccuracyRow", "ConventionError", "DifferentiableLayer", "Layer"),
        *("Report", "Row"),
        *("assert_parity", "batch_norm_layer", "compare", "compare_accuracy", "compare_models"),
        *("equinox_layer", "haiku_layer", "identify", "keras_layer", "linen_layer"),
        *("match_names", "nnx_layer", "torch_layer"),
    ],
}


MODULES = [
    jaxbn,
    *(importlib.import_module(f"jaxbn.{name}") for name in NAMES),
]


def public(module):
    """Return the names that a module defines itself."""
    return {n for n, v in vars(module).items() if n[0] != "_" and not inspect.ismodule(v)}


def test_public_names():
    assert jaxbn.__all__ == sorted(jaxbn.__all__)
    assert (
        set(jaxbn.__all__)
        == public(jaxbn)
        == {
            *("EXERCISE", "FLAX", "KERAS", "PYTORCH"),
            *("batch_norm", "batch_renorm", "decay_mask", "init", "keep_finite"),
        }
    )


@pytest.mark.parametrize("name", NAMES)
def test_public_names_of(name):
    module = importlib.import_module(f"jaxbn.{name}")
    assert sorted(module.__all__) == module.__all__ == NAMES[name]


@pytest.mark.parametrize("module", [*MODULES, jaxbn.health], ids=lambda module: module.__name__)
def test_the_reference_has_a_page_for_every_module(module):
    """The page is made from the module, and lists the names in its `__all__`."""
    assert f"\n   {module.__name__}\n" in (ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, Mapping):
            continue
        text = inspect.getdoc(value)
        assert text, name
        if inspect.isfunction(value):
            for section in ("Args:", "Returns:", "Example:"):
                assert section in text or (section == "Returns:" and "Raises:" in text), name
            for parameter in inspect.signature(value).parameters:
                assert re.search(rf"^ +(\w+, )*\**{parameter}(, \w+)*: ", text, re.M), (
                    name,
                    parameter,
                )


def test_signatures():
    def spell(function):
        return [str(p).split(":")[0] + ("" if p.default is p.empty else f"={p.default!r}")
                for p in inspect.signature(function).parameters.values()]  # fmt: skip

    assert spell(jaxbn.batch_norm) == [
        *("params", "state", "x", "train", "axis=-1", "momentum=0.9", "epsilon=1e-05"),
        *("batch_variance='biased'", "running_variance='unbiased'", "axis_name=None"),
        *("axis_index_groups=None", "mask=None", "dtype=None", "virtual_batch_size=None"),
    ]
    positional = [p.name for p in inspect.signature(jaxbn.batch_norm).parameters.values()
                  if p.kind is p.POSITIONAL_OR_KEYWORD]  # fmt: skip
    assert positional == ["params", "state", "x", "train"]
    assert list(inspect.signature(jaxbn.init).parameters) == [
        *("shape", "axis", "use_scale", "use_bias", "param_dtype", "keepdims", "track_count")
    ]


def test_importing_needs_only_jax():
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['flax', 'optax', 'torch', 'matplotlib']));"
        "import jaxbn"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape


def test_the_readme_prints_the_commands():
    for command in (
        "pip install -e .",
        'pip install -e ".[examples]" && python -m train_examples.digits',
        'pip install -e ".[test]" && pytest',
    ):
        assert f"```bash\n{command}\n```" in README


@pytest.mark.parametrize("preset", ["PYTORCH", "FLAX", "KERAS", "EXERCISE"])
def test_the_table_of_conventions_says_what_the_presets_are(preset):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `jaxbn.{preset}`")]
    _, momentum, epsilon, batch, running = (cell.strip() for cell in row.strip("|").split("|"))
    convention = getattr(jaxbn, preset)
    assert float(momentum.split()[0]) == convention["momentum"]
    assert float(epsilon) == convention["epsilon"]
    assert (batch, running) == (convention["batch_variance"], convention["running_variance"])


# A package index shows the README without the files beside it.
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
FILES = re.compile(
    re.escape(f"{REPOSITORY}/blob/main/")
    + "|"
    + re.escape(f"{REPOSITORY.replace('//github.com', '//raw.githubusercontent.com')}/main/")
)


def test_links_of_the_readme_are_absolute_and_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert len(targets) > 10
    for target in targets:
        assert FILES.match(target), target
        path = FILES.sub("", target)
        # The package may be installed somewhere else.
        root = Path(jaxbn.__file__).parent.parent if path.startswith("jaxbn/") else ROOT
        assert (root / path).is_file(), target


PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("train_examples/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


CODE = {
    page.name: "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    for page in sorted(ROOT.glob("docs/*.md"))
}


@pytest.mark.parametrize("page", [name for name, code in CODE.items() if code])
def test_the_code_in_the_docs_runs(page):
    """Pages run in their own process, as one of them asks for devices."""
    if "import torch" in CODE[page]:
        pytest.importorskip("torch")
    subprocess.run([sys.executable, "-c", CODE[page]], check=True, cwd=ROOT)
