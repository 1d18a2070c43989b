"""Metrics of each epoch and each validation, and the time of training."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl

from bn_lightning.training.task import Task


class Records(pl.Callback):
    """A callback that records metrics and the training time, and prints a line per epoch.

    Attributes:
        epochs: training metrics of each epoch, as running means over the epoch.
        validations: step and metrics of each validation.
        seconds: wall time of training in s, with logging and checkpoints, without
            validation.
        images: number of training samples over all processes. The checkpoint has the
            same key.
        best_since: only validations after this step are candidates for the best one. It
            is not 0 if the run starts from a checkpoint of a run that selected none.
    """

    _STATE = ("epochs", "validations", "seconds", "images", "_of_epoch", "_validated")

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.seconds = 0.0
        self.images = 0
        self.best_since = 0
        self._of_epoch = (0, 0.0)  # samples and seconds at the start of the epoch
        self._validated = False  # in this epoch
        self._clock: float | None = None  # start of the current interval, None during validation

    def state_dict(self) -> dict[str, Any]:
        self._stop_clock()
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state_dict[name])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["callbacks"].values()
        if not any(state.get("best_model_score") for state in states):
            self.best_since = checkpoint["global_step"]

    def _stop_clock(self) -> None:
        if self._clock is not None:
            now = time.perf_counter()
            self.seconds += now - self._clock
            self._clock = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Task)
        self.images += pl_module.step_samples

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop_clock()
            self._clock = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if trainer.sanity_checking:
            return
        found = {name: float(trainer.callback_metrics[name]) for name in pl_module.names("val")}
        self.validations.append({"step": trainer.global_step, **found})
        if not math.isfinite(found["val_loss"]) and trainer.is_global_zero:
            message = (
                f"WARNING: the validation loss is {found['val_loss']} after step "
                f"{trainer.global_step:,}. Try a smaller --model.lr."
            )
            print(message, file=sys.stderr, flush=True)
        self._validated = True
        self._clock = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        logged = trainer.callback_metrics
        # Nothing is logged if the run was resumed after the last step of the epoch.
        if "train_loss_epoch" not in logged:
            return
        metrics = {n: float(logged[n]) for n in pl_module.names("train") if n != "train_loss"}
        metrics = {"train_loss": float(logged["train_loss_epoch"]), **metrics}
        self.epochs.append(metrics)
        speed = self._speed_of_epoch()
        pl_module.log("images_per_second", speed, sync_dist=True)
        shown = metrics
        if self._validated:
            validation = self.validations[-1]
            shown = metrics | {name: validation[name] for name in pl_module.names("val")}
            self._validated = False
        pl_module.print(_line(trainer, shown, speed))

    def _speed_of_epoch(self) -> float:
        """Return samples per second of the epoch that has just ended."""
        self._stop_clock()
        samples, seconds = self._of_epoch
        self._of_epoch = (self.images, self.seconds)
        return (self.images - samples) / (self.seconds - seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        self._clock = None


def _line(trainer: pl.Trainer, metrics: dict[str, float], speed: float) -> str:
    """Return the line to print for an epoch."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    on_test_set = getattr(data, "validates_on_test_set", False)
    shown = []
    for name, value in metrics.items():
        stage, _, metric = name.partition("_")
        stage = "test" if stage == "val" and on_test_set else stage
        shown.append(f"{stage} {metric.replace('_', ' ')} {value:.3f}")
    total = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    number = f"epoch {trainer.current_epoch + 1:2}{total}"
    return f"{number}  {'  '.join(shown)}  {speed:,.0f} samples/s"


def recorded_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the state of `Records` in a checkpoint: `epochs`, `validations` and others."""
    return dict(checkpoint.get("callbacks", {}).get(Records.__name__, {}))
