"""Refusal to resume with an optimizer or scheduler of another class.

The state in a checkpoint belongs to the classes that wrote it. Another class fails in its
first step, or silently continues with wrong values.
"""

from typing import Any

import lightning.pytorch as pl

from bn_lightning.errors import UserError

Names = dict[str, list[str]]  # the class names of all optimizers, and of all schedulers


def of(trainer: pl.Trainer) -> Names:
    """Return the class names of the optimizers and schedulers of a run."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {
        "optimizer": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "scheduler": [type(scheduler).__name__ for scheduler in schedulers],
    }


def in_checkpoint(checkpoint: dict[str, Any]) -> Names:
    """Return the class names in a checkpoint; those of an old version are in its settings."""
    found: Names | None = checkpoint.get("optimization")
    if found is not None:
        return found
    settings = checkpoint.get("hyper_parameters", {})
    if not {"optimizer_args", "scheduler_args"} <= settings.keys():
        return {}  # not the settings of a Task
    names = {name: settings[name] for name in ("optimizer", "scheduler")}
    return {kind: [name.rpartition(".")[2]] if name else [] for kind, name in names.items()}


def refuse_others(now: Names, before: Names) -> None:
    """Refuse to resume with other classes.

    Args:
        before: the classes in the checkpoint; empty without a checkpoint.

    Raises:
        UserError: the optimizers or the schedulers differ.
    """
    for name, names in before.items():
        if now[name] != names:
            was, is_now = (", ".join(classes) or "none" for classes in (names, now[name]))
            raise UserError(
                f"The {name} was {was} when the run started and is now {is_now}.\n"
                "It cannot be changed: its state in the checkpoint belongs to the steps done so "
                "far.\n"
                "Remove the setting to resume, or start a new run without the checkpoint."
            )
