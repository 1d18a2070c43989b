"""TensorBoard's logger in the folder of a run."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task


class TensorBoard(TensorBoardLogger):
    """Keeps the events of `fit` and of its closing test in one file, and writes no hparams.yaml."""

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def save(self) -> None:
        pass

    def log_result(
        self, trainer: pl.Trainer, task: Task, data: DataModule, result: dict[str, Any]
    ) -> None:
        """Show settings and results under HParams, and close the file."""
        stages = [task.names(stage) for stage in ("test", "val", "train")]
        # The loss comes after the other metrics.
        shown = [name for names in stages for name in (*names[1:], names[0])]
        metrics = {
            f"result/{name}": result[name]
            for name in (*shown, "images_per_second")
            if result[name] is not None
        }
        settings = {n: v for n, v in data.hparams.items() if n not in data.machine_settings}
        trained = {"max_epochs": trainer.max_epochs, "precision": trainer.precision}
        hyperparameters = {**task.hparams, **settings, **trained}
        self.log_hyperparams(hyperparameters, metrics, trainer.global_step)
        self.experiment.close()
