"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from dataclasses import asdict
from typing import Any

import orbax.checkpoint as ocp

from train_examples.digits.config import Config, UserError
from train_examples.digits.history import History


def open_manager(config: Config) -> ocp.CheckpointManager:
    """Orbax's manager of the checkpoints in `config.out`.

    A resumed run must find a checkpoint there, made with its options; a new run none.
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
        options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
    )
    if config.resume:
        if manager.latest_step() is None:
            raise nothing
        _check_options(manager, config)
    elif manager.latest_step() is not None:
        raise UserError(
            f"--out {config.out} has checkpoints of an earlier run: go on with it by --resume, or "
            f"name another folder."
        )
    return manager


def save(
    manager: ocp.CheckpointManager, epoch: int, state: Any, history: History, config: Config
) -> None:
    """Writes the checkpoint of an epoch whole, or not at all; then removes the one before."""
    manager.save(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.JsonSave(asdict(history)),
            options=ocp.args.JsonSave(config.decisive()),
        ),
    )


def restore(manager: ocp.CheckpointManager, like: Any) -> tuple[Any, History]:
    """The latest checkpoint's state, of the structure of `like`, and history."""
    restored = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], History(**restored["history"])


def _check_options(manager: ocp.CheckpointManager, config: Config) -> None:
    args = ocp.args.Composite(options=ocp.args.JsonRestore())
    stored = manager.restore(manager.latest_step(), args=args)["options"]
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
