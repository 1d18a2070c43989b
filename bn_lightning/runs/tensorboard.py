"""The TensorBoard logger of a run."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.training import lightning_internals
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task

# Without the name of the tab, TensorBoard opens on Time Series. This is its default
# port.
CHARTS = "http://localhost:6006/#custom_scalars"
# The hyperparameters that TensorBoard shows first, with those of `Task.facts`.
SHOWN_FIRST = ("lr", "batch_size", "max_epochs", "seed")


class TensorBoard(TensorBoardLogger):
    """Writes the events of `fit` and its test to one file, and no hparams.yaml."""

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def save(self) -> None:
        pass

    def log_result(
        self, trainer: pl.Trainer, task: Task, data: DataModule, result: dict[str, Any]
    ) -> None:
        """Log settings and results for the HParams tab, and close the file."""
        stages = [task.names(stage) for stage in ("test", "val", "train")]
        # The loss comes after the other metrics.
        shown = [name for names in stages for name in (*names[1:], names[0])]
        metrics = {
            f"result/{name}": result[name]
            for name in (*shown, "images_per_second")
            if result[name] is not None
        }
        left_out = (*data.machine_settings, *data.found_in_data)
        settings = {n: v for n, v in data.hparams.items() if n not in left_out}
        trained = {"max_epochs": trainer.max_epochs, "precision": trainer.precision}
        hyperparameters = {**task.hparams, **settings, **trained}
        self.log_metrics(metrics, trainer.global_step)
        for summary in _hparams_summaries(hyperparameters, metrics, (*task.facts(), *SHOWN_FIRST)):
            self.experiment.file_writer.add_summary(summary, trainer.global_step)
        self.experiment.close()


def _hparams_summaries(
    hyperparameters: dict[str, Any], metrics: dict[str, float], shown_first: Sequence[str]
) -> list[Any]:
    """Return the summaries of a run under HParams: experiment, session start and session end."""
    # Imported here, since they take 60 ms and only the end of a run needs them.
    from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import hparams

    flat = lightning_internals.loggable(hyperparameters)
    experiment, start, end = hparams(flat, metrics)  # type: ignore[no-untyped-call]
    plugin_data = experiment.value[0].metadata.plugin_data
    content = plugin_data_pb2.HParamsPluginData.FromString(plugin_data.content)
    # The table opens with five hyperparameters: first those marked as different between
    # runs, then the others, in alphabetical order. Without marks it would show neither
    # lr nor norm.
    for info in content.experiment.hparam_infos:
        info.differs = info.name in shown_first
    plugin_data.content = content.SerializeToString()
    return [experiment, start, end]
