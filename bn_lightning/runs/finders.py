"""Callbacks that search for a setting before training: LearningRateFinder, BatchSizeFinder.

They load a checkpoint of their own, which would discard the state that a resumed run has
loaded. So they search only when a run starts, and what they find is recorded as a setting
of the run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from bn_lightning.runs import folder
from bn_lightning.training.task import Task


def in_callbacks(callbacks: Iterable[Any]) -> list[pl.Callback]:
    """Return the callbacks that search before training. A subclass may search later."""
    searches = (BatchSizeFinder.on_fit_start, LearningRateFinder.on_fit_start)
    return [c for c in callbacks if getattr(type(c), "on_fit_start", None) in searches]


class FoundSettings(pl.Callback):
    """Makes a found value a setting of the run, as if the user had set it.

    The optimizer and the scheduler are created again: their learning rates and their
    length depend on it. The value is written to the run's folder, for --resume.

    Attributes:
        folder: folder of the run; None on ranks that do not write to it.
    """

    folder: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._before = _settings(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        # The test after training must not search again.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        finders = in_callbacks(callbacks)
        trainer.callbacks = [c for c in callbacks if c not in finders]  # type: ignore[attr-defined]
        now = _settings(trainer, pl_module)
        found = {n: (self._before[n], now[n]) for n in now if self._before[n] != now[n]}
        if not found:
            return
        pl_module.optimization.lr = pl_module.hparams["lr"]
        trainer.strategy.setup_optimizers(trainer)
        pl_module.print(
            "found by search: " + ", ".join(f"--{name} {new}" for name, (_, new) in found.items())
        )
        if self.folder is not None:
            folder.record_changes(self.folder, found)


def _settings(trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any]:
    """Return the settings of the task and the data by the names of their flags."""
    data = trainer.datamodule.hparams  # type: ignore[attr-defined]
    return {f"model.{name}": value for name, value in task.hparams.items()} | {
        f"data.{name}": value for name, value in data.items()
    }
