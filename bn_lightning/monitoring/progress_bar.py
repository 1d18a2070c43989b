"""The progress bar of a run."""

import contextlib
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torchmetrics import Metric

from bn_lightning.training.task import Task


class MetricsProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with the metrics of the current epoch.

    For a `Task`, it shows the loss of the last logged step, and the training value of
    the metric that selects the best checkpoint. For other modules, it shows the metrics
    that they log with `prog_bar=True`. Samples per second are shown if the data module
    has a `batch_size`.
    """

    # Samples per second replace Lightning's iterations per second.
    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self) -> None:
        # One refresh takes a few percent of the time of a step.
        super().__init__(refresh_rate=10)
        # The first batch of the epoch in this process. It is not 0 in a resumed epoch.
        self._first_batch: int | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        # The line that is printed after an epoch also counts from 1.
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}")
        self._first_batch = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._first_batch is None:
            self._first_batch = batch_idx

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        logged = super().get_metrics(trainer, pl_module)
        if not isinstance(pl_module, Task):
            return {**self._speed(trainer), **logged}
        loss = trainer.callback_metrics.get("train_loss")
        shown: dict[str, Any] = {"loss": "" if loss is None else float(loss)}
        if trainer.training:
            shown |= _selected_metric(pl_module)
        # Lightning's training means are those of the previous epoch. Its version number
        # is part of the run folder, which is printed above the bar.
        hidden = {"v_num", *pl_module.names("train")}
        rest = {name: value for name, value in logged.items() if name not in hidden}
        return {**shown, **self._speed(trainer), **rest}

    def _speed(self, trainer: pl.Trainer) -> dict[str, str]:
        bar = self.train_progress_bar.format_dict
        size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if not size or not bar["elapsed"]:
            return {}
        batches = bar["n"] - (self._first_batch or 0)
        return {"samples/s": f"{batches * size / bar['elapsed']:,.0f}"}


def _selected_metric(task: Task) -> dict[str, str]:
    """Return the training value of the task's selected metric: this epoch so far, this rank."""
    name = task.selects[0].removeprefix("val_")
    metric = getattr(task, f"train_{name}", None)
    if name == "loss" or not isinstance(metric, Metric) or not metric.update_called:
        return {}
    # A metric made of other metrics calls their compute(), which synchronizes ranks. A
    # metric that stores all samples becomes slower with each batch.
    has_parts = any(isinstance(part, Metric) for part in list(metric.modules())[1:])
    stores_samples = any(isinstance(state, list) for state in metric.metric_state.values())
    if has_parts or stores_samples:
        return {}
    # The metric's own compute() would synchronize ranks and cache the value, which
    # would then be logged as the value of the whole epoch. The function of the class
    # does neither.
    # Some metrics raise an exception until they have seen enough samples.
    with contextlib.suppress(Exception):
        value = type(metric).compute(metric)
        if isinstance(value, Tensor) and value.numel() == 1:
            return {name: f"{float(value):.3f}"}
    return {}
