"""What a release states in several places is the same in all of them."""

import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import jaxbn
from tests.raises import raises

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "set_repository.py"))
ADDRESS = re.compile(r"https://(raw\.githubusercontent|github)\.com/(jaxbn/[\w.-]*\w)")


def test_the_version_and_its_date():
    cited = (ROOT / "CITATION.cff").read_text()
    heading = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert heading[1] == jaxbn.__version__
    assert f"version: {heading[1]}\ndate-released: {heading[2]}\n" in cited


def test_the_supported_versions():
    """The README states the versions of the dependencies, and of Python as its classifiers do."""
    (row,) = re.findall(r"^With Python .*?$", (ROOT / "README.md").read_text(), re.M)
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert row.startswith(f"With Python {versions[0]} to {versions[-1]}, ")
    for dependency in PROJECT["dependencies"]:
        name, _, least = dependency.partition(">=")
        assert f"{name} {least}".lower() in row.lower()


def addresses(root, name):
    return {match[2] for match in ADDRESS.finditer((root / name).read_text())}


@pytest.mark.parametrize("name", SCRIPT["FILES"])
def test_addresses_begin_with_the_projects(name):
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    assert addresses(ROOT, name) == {repository}


def test_no_other_file_has_the_address():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    names = [name for name in listed.stdout.split("\0") if name and not name.endswith(".png")]
    assert {name for name in names if addresses(ROOT, name)} == set(SCRIPT["FILES"])


def test_setting_the_repository(tmp_path):
    for name in SCRIPT["FILES"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    SCRIPT["set_repository"]("https://github.com/someone/batch-norm", tmp_path)
    old = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    for name in SCRIPT["FILES"]:
        wanted = (ROOT / name).read_text().replace(f".com/{old}", ".com/someone/batch-norm")
        assert (tmp_path / name).read_text() == wanted
    # Names are kept that only begin like the repository's.
    (tmp_path / "README.md").write_text("https://github.com/someone/batch-norms")
    SCRIPT["set_repository"]("https://github.com/else/x", tmp_path)
    assert (tmp_path / "README.md").read_text() == "https://github.com/someone/batch-norms"


@pytest.mark.parametrize(
    "address",
    ["https://gitlab.com/a/b", "https://github.com/a", "https://github.com/a/b.git", "a/b"],
)
def test_an_address_that_is_none(address, tmp_path):
    with raises(ValueError, f"the address must be https://github.com/OWNER/NAME, got {address}."):
        SCRIPT["set_repository"](address, tmp_path)
