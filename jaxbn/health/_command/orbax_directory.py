"""Read Orbax directories."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn.health._command.errors import CheckpointError, Wanted, missing_package
from jaxbn.health._command.names import in_natural_order

# Orbax writes this file into the directory of every tree.
_METADATA = "_METADATA"


def find_step(directory: Path, step: int | None) -> tuple[int | None, Path]:
    """Return the step, by default the latest, and its directory.

    If there are no steps, return None and the directory itself.
    """
    steps = {} if _is_tree(directory) else _steps(directory)
    if not steps:
        if step is not None:
            raise CheckpointError(f"{directory} has no steps: leave out --step")
        return None, directory
    if step is None:
        step = max(steps)
    if step not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise CheckpointError(f"{directory} has no step {step}; it has {there}")
    return step, steps[step]


def read(directory: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """Return the wanted arrays of all trees in a directory, such as that of a step.

    A name consists of the keys on the path to the array, joined by slashes. If there are several
    trees, it begins with the name of the tree.
    """
    trees = [item for item in (directory, *_directories(directory)) if _is_tree(item)]
    if not trees:
        raise CheckpointError(
            f"{directory} is not an Orbax checkpoint: neither it nor a directory in it has a "
            f"{_METADATA} file"
        )
    if len(trees) == 1:
        return in_natural_order(_read_tree(trees[0], wanted))
    arrays = {
        f"{tree.name}/{name}": array
        for tree in trees
        for name, array in _read_tree(tree, wanted).items()
    }
    return in_natural_order(arrays)


def _read_tree(directory: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    try:
        import orbax.checkpoint as ocp
        from etils import epath
    except ImportError:
        raise missing_package("orbax-checkpoint", f"the directory {directory}") from None

    handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(directory.absolute())
    stored = handler.metadata(path).tree

    def select(path: Any, leaf: Any) -> Any:
        return leaf if wanted(_name(path)) else ocp.PLACEHOLDER

    selected = jax.tree_util.tree_map_with_path(select, stored)
    # Restore NumPy arrays, since the devices of the training run may not exist here.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), selected)
    arguments = ocp.args.PyTreeRestore(item=selected, restore_args=as_numpy)
    restored = handler.restore(path, args=arguments)
    leaves = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {_name(path): np.asarray(leaf) for path, leaf in leaves if leaf is not ocp.PLACEHOLDER}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _steps(directory: Path) -> dict[int, Path]:
    """Return the complete steps in a directory, such as "10", "step_10" or "00000010"."""
    steps = {}
    for child in _directories(directory):
        number = re.fullmatch(r"(?:.*_)?([0-9]+)", child.name)
        if number and "orbax-checkpoint-tmp" not in child.name:
            steps[int(number[1])] = child
    return steps


def _directories(directory: Path) -> list[Path]:
    return sorted(child for child in directory.iterdir() if child.is_dir())


def _is_tree(directory: Path) -> bool:
    return (directory / _METADATA).is_file()
