"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import hashlib
import sys
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train_examples.digits.config import Config, UserError
from train_examples.digits.history import History


def open_manager(config: Config) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in `config.out`.

    A resumed run must find a checkpoint there; a new run none.
    """
    folder = config.out.resolve() / "checkpoints"
    nothing = UserError(
        f"--resume: there is no checkpoint in {config.out}; name the folder of the run to go on "
        f"with by --out, or start a new run without --resume."
    )
    if config.resume and not folder.is_dir():
        raise nothing
    # An epoch takes longer than writing its checkpoint, and a written one is safe.
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    if config.resume:
        if manager.latest_step() is None:
            raise nothing
    elif manager.latest_step() is not None:
        raise UserError(
            f"--out {config.out} has checkpoints of an earlier run: go on with it by --resume, or "
            f"name another folder."
        )
    return manager


def save(
    manager: ocp.CheckpointManager, epoch: int, state: Any, history: History, config: Config
) -> None:
    """Writes the checkpoint of an epoch whole, or not at all; the one before stays beside it."""
    manager.save(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.JsonSave(asdict(history)),
            options=ocp.args.JsonSave(config.decisive()),
            digest=ocp.args.JsonSave({"sha256": _digest(state)}),
        ),
    )


def restore(manager: ocp.CheckpointManager, like: Any, config: Config) -> tuple[Any, History]:
    """State, of the structure of `like`, and history of the latest checkpoint that is whole.

    One that is not is named on stderr and removed, so that its epoch can be written again.
    """
    broken = []
    for epoch in sorted(manager.all_steps(), reverse=True):
        try:
            _check_options(manager, epoch, config)
            restored = manager.restore(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    history=ocp.args.JsonRestore(),
                    digest=ocp.args.JsonRestore(),
                ),
            )
            if restored["digest"]["sha256"] != _digest(restored["state"]):
                raise ValueError("its numbers are not those that were written")
        except UserError:
            raise
        except Exception as error:  # whatever the libraries beneath make of a damaged file
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            broken.append((epoch, reason))
            continue
        for damaged, reason in broken:
            print(
                f"the checkpoint of epoch {damaged} in {config.out} is damaged ({reason}); going "
                f"on from that of epoch {epoch}.",
                file=sys.stderr,
            )
            manager.delete(damaged)
        return restored["state"], History(**restored["history"])
    reasons = "; ".join(f"that of epoch {epoch}: {reason}" for epoch, reason in broken)
    raise UserError(
        f"--resume: no checkpoint in {config.out} is whole ({reasons}). Start a new run in another "
        f"folder."
    )


def _digest(state: Any) -> str:
    """A checksum of every bit of the state."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        values = np.asarray(jax.numpy.asarray(leaf))  # a step that is a Python number, too
        sha.update(f"{jax.tree_util.keystr(path)}{values.dtype}{values.shape}".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def _check_options(manager: ocp.CheckpointManager, epoch: int, config: Config) -> None:
    args = ocp.args.Composite(options=ocp.args.JsonRestore())
    stored = manager.restore(epoch, args=args)["options"]
    differing = [
        f"--{name.replace('_', '-')} is {given}, the checkpoint has {stored.get(name)}"
        for name, given in config.decisive().items()
        if stored.get(name) != given
    ]
    if differing:
        raise UserError(
            f"--resume needs the options that the run in {config.out} began with, as the data "
            f"order and the learning rate's schedule follow from them: {'; '.join(differing)}."
        )
