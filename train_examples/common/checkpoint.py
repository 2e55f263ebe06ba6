"""Checkpoints: everything a run needs to continue as if it had never stopped."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train_examples.common import storage
from train_examples.common.config import Config
from train_examples.common.errors import UserError
from train_examples.common.history import History


@contextmanager
def open_manager(config: Config) -> Iterator[ocp.CheckpointManager]:
    """Yield Orbax's manager of the checkpoints in `config.out`, which this run locks.

    A resumed run must find a checkpoint there, and a new run must find none.
    """
    with ExitStack() as stack:
        with storage.writing("checkpoints", config.out):
            if config.resume and not has_checkpoint(config.out):
                raise UserError(
                    f"--resume: there is no checkpoint in {config.out}; name the folder of the run "
                    f"to continue by --out, or start a new run without --resume."
                )
            if jax.process_index() == 0:  # on behalf of all processes of a run
                stack.enter_context(storage.locked(config.out))
            if not config.resume and has_checkpoint(config.out):
                raise UserError(
                    f"--out {config.out} has checkpoints of an earlier run: continue it by "
                    f"--resume, or name another folder."
                )
            # Writing a checkpoint takes less time than an epoch, and a written one is safe.
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            manager = ocp.CheckpointManager(_folder(config.out), options=options)
            stack.enter_context(manager)
        yield manager


def has_checkpoint(out: Path) -> bool:
    """Return whether a run has written a complete checkpoint to the folder `out`."""
    # Orbax names a checkpoint by its number once it is complete.
    folder = _folder(out)
    return os.path.isdir(folder) and any(name.isdigit() for name in os.listdir(folder))


def how_to_resume(out: Path) -> str:
    """Return what to do after a run that writes to the folder `out` was interrupted."""
    if has_checkpoint(out):
        return "the same command with --resume continues after the last complete epoch."
    return "no epoch was complete yet, so start the same command again."


def save(
    manager: ocp.CheckpointManager, epoch: int, state: Any, history: History, config: Config
) -> None:
    """Write the checkpoint of an epoch completely or not at all, and keep the one before it."""
    notes = {"history": asdict(history), "options": config.decisive()}
    checksums = {"state": _checksum(state), "notes": _checksum_of_json(notes)}
    with storage.writing(f"the checkpoint of epoch {epoch}", config.out):
        manager.save(
            epoch,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                checksums=ocp.args.JsonSave(checksums),
                **{name: ocp.args.JsonSave(note) for name, note in notes.items()},
            ),
        )


def restore(manager: ocp.CheckpointManager, like: Any, config: Config) -> tuple[Any, History]:
    """Return the state and the history of the latest intact checkpoint.

    A damaged one is named on stderr and removed, so that its epoch can be written again.

    Args:
      manager: what `open_manager` yields.
      like: a state of the same structure, shapes, dtypes and devices.
      config: the options, which must be those of the run that wrote the checkpoint.

    Raises:
      UserError: no checkpoint is intact, or the options differ.
    """
    broken = []
    for epoch in sorted(manager.all_steps(), reverse=True):
        try:
            state, history = _restore_epoch(manager, epoch, like, config)
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise anything in Orbax and below
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            broken.append((epoch, reason))
            continue
        for damaged, reason in broken:
            print(
                f"the checkpoint of epoch {damaged} in {config.out} is damaged ({reason}); "
                f"continuing from that of epoch {epoch}.",
                file=sys.stderr,
            )
            with storage.writing("checkpoints", config.out):
                manager.delete(damaged)
        return state, history
    reasons = "; ".join(f"that of epoch {epoch}: {reason}" for epoch, reason in broken)
    raise UserError(
        f"--resume: no checkpoint in {config.out} is intact ({reasons}). Start a new run in "
        f"another folder."
    )


def _restore_epoch(
    manager: ocp.CheckpointManager, epoch: int, like: Any, config: Config
) -> tuple[Any, History]:
    """Return the contents of the checkpoint of an epoch, after comparing their checksums."""
    args = {name: ocp.args.JsonRestore() for name in ("history", "options", "checksums")}
    restored = manager.restore(epoch, args=ocp.args.Composite(**args))
    notes = {name: restored[name] for name in ("history", "options")}
    if restored["checksums"]["notes"] != _checksum_of_json(notes):
        raise ValueError("its history or options have changed since they were written")
    _check_options(notes["options"], config)
    history = History(**notes["history"])
    if len(history.test_accuracy) != epoch:
        raise ValueError(f"it holds epoch {len(history.test_accuracy)}")

    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    state = manager.restore(epoch, args=args)["state"]
    if restored["checksums"]["state"] != _checksum(state):
        raise ValueError("its arrays have changed since they were written")
    return state, history


def _checksum(state: Any) -> str:
    """Return a checksum of all arrays of a state, with their paths, dtypes and shapes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        values = np.asarray(jax.numpy.asarray(leaf))  # the step may be a Python number
        sha.update(f"{jax.tree_util.keystr(path)}{values.dtype}{values.shape}".encode())
        sha.update(values.tobytes())
    return sha.hexdigest()


def _checksum_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_options(stored: dict[str, Any], config: Config) -> None:
    differing = [
        f"--{name.replace('_', '-')} is {given}, the checkpoint has {stored.get(name)}"
        for name, given in config.decisive().items()
        if stored.get(name) != given
    ]
    if differing:
        raise UserError(
            f"--resume needs the options that the run in {config.out} began with, since they "
            f"determine the order of the data and the learning rate: {'; '.join(differing)}."
        )


def _folder(out: Path) -> Path:
    return out.resolve() / "checkpoints"
