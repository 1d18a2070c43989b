"""What a run measures: metrics of each epoch and validation, and times."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl

from bn_lightning.training.task import Task


class Records(pl.Callback):
    """Times the training, keeps the metrics of each epoch, and prints a line for each.

    Attributes:
        epochs: the training metrics of each epoch, running means over it.
        validations: step and metrics of each validation.
        seconds: wall time of the training epochs, logging and checkpoints included, validation
            excluded.
        images: samples trained on, over all processes. The name is that of the checkpoint's key.
        best_since: the step after which validations of this run are comparable. A run that starts
            from a checkpoint without a best one cannot compare its own with those before.
    """

    _KEPT = ("epochs", "validations", "seconds", "images", "_of_epoch", "_validated")

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.seconds = 0.0
        self.images = 0
        self.best_since = 0
        self._of_epoch = (0, 0.0)  # samples and seconds when the epoch began
        self._validated = False  # in this epoch
        self._clock: float | None = None  # set while it runs

    def state_dict(self) -> dict[str, Any]:
        self._stop_clock()
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self._KEPT:
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
            print(
                f"WARNING: the validation loss is {found['val_loss']} after step "
                f"{trainer.global_step:,}: a smaller --model.lr may help",
                file=sys.stderr,
                flush=True,
            )
        self._validated = True
        self._clock = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        logged = trainer.callback_metrics
        # A run that was resumed after the last step of an epoch has logged nothing.
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
        """Return samples per second of the epoch that ends."""
        self._stop_clock()
        samples, seconds = self._of_epoch
        self._of_epoch = (self.images, self.seconds)
        return (self.images - samples) / (self.seconds - seconds)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        self._clock = None


def _line(trainer: pl.Trainer, metrics: dict[str, float], speed: float) -> str:
    """Return the line that is printed for an epoch."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    on_test_set = getattr(data, "validates_on_test_set", False)
    shown = []
    for name, value in metrics.items():
        stage, _, metric = name.partition("_")
        stage = "test" if stage == "val" and on_test_set else stage
        shown.append(f"{stage} {metric.replace('_', ' ')} {value:.3f}")
    of_epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    number = f"epoch {trainer.current_epoch + 1:2}{of_epochs}"
    return f"{number}  {'  '.join(shown)}  {speed:,.0f} samples/s"


def recorded_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what `Records` has kept in a checkpoint: `epochs`, `validations` and others."""
    return dict(checkpoint.get("callbacks", {}).get(Records.__name__, {}))
