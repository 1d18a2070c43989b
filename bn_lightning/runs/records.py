"""What a run leaves behind: its folder, TensorBoard's events, result.json, and the lines at the terminal."""

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from bn_lightning.data.fashion_mnist import FashionMNIST
from bn_lightning.errors import UserError
from bn_lightning.tasks.classifier import global_size
from bn_lightning.training import checkpoints


class TensorBoard(TensorBoardLogger):
    """Events of `fit` and of the test that ends it in one file, and no hparams.yaml beside config.yaml."""

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.flush()

    def save(self) -> None:
        pass


class Records(pl.Callback):
    """Times the training, keeps each epoch's figures, prints a line for each, and writes result.json.

    Attributes:
        epochs: the train figures of each epoch, running averages over it.
        validations: the figures of each validation.
        seconds: wall time of the training epochs, logging and checkpoints included, validation excluded.
        images: images trained on, over all processes.
    """

    _KEPT = ("epochs", "validations", "seconds", "images", "_of_epoch", "_validated")  # in a checkpoint

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.seconds = 0.0
        self.images = 0
        self._of_epoch = (0, 0.0)  # images and seconds when the epoch began
        self._validated = False  # in this epoch
        self._clock: float | None = None  # while it runs
        self._best_since = 0  # the step; with a best checkpoint of before this run cannot compare its own

    def state_dict(self) -> dict[str, Any]:
        self._stop_clock()
        return {name: getattr(self, name) for name in self._KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, state_dict[name])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not any(state.get("best_model_score") for state in checkpoint["callbacks"].values()):
            self._best_since = checkpoint["global_step"]

    def _stop_clock(self) -> None:
        if self._clock is not None:
            now = time.perf_counter()
            self.seconds += now - self._clock
            self._clock = now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += global_size(trainer, batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop_clock()
            self._clock = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            figures = {name: float(trainer.callback_metrics[name]) for name in ("val_loss", "val_acc")}
            self.validations.append({"step": trainer.global_step, **figures})
            if not math.isfinite(figures["val_loss"]) and trainer.is_global_zero:
                said = f"WARNING: the validation loss is {figures['val_loss']} after step {trainer.global_step:,}"
                print(f"{said}: a smaller --model.lr may help", file=sys.stderr, flush=True)
            self._validated = True
            self._clock = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if "train_loss_epoch" not in metrics:  # resumed from best.ckpt, behind the last step of the epoch
            return
        figures = {"train_loss": float(metrics["train_loss_epoch"]), "train_acc": float(metrics["train_acc"])}
        self.epochs.append(figures)
        self._stop_clock()
        images, seconds = self._of_epoch
        speed = (self.images - images) / (self.seconds - seconds)
        self._of_epoch = (self.images, self.seconds)
        pl_module.log("images_per_second", speed, sync_dist=True)
        shown = figures
        if self._validated:
            shown = figures | {name: self.validations[-1][name] for name in ("val_loss", "val_acc")}
            self._validated = False
        on_test_set = getattr(trainer.datamodule, "validates_on_test_set", False)  # type: ignore[attr-defined]
        names = {"val_loss": "test loss", "val_acc": "test acc"} if on_test_set else {}
        line = "  ".join(f"{names.get(name, name.replace('_', ' '))} {value:.3f}" for name, value in shown.items())
        of_epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        pl_module.print(f"epoch {trainer.current_epoch + 1:2}{of_epochs}  {line}  {speed:,.0f} images/s")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        self._clock = None

    def result(self, trainer: pl.Trainer, data: FashionMNIST, norm: str, kept: str) -> dict[str, Any]:
        """The flat object of result.json at the end of training; `test_loss` and `test_acc` are still to come.

        `kept` names the weights that will be tested. Train figures are running averages over the last epoch. `val_loss`
        and `val_acc` are those of the kept weights: of the best validation when a checkpoint was selected, else of the
        last.
        """
        assert data.images is not None
        last_epoch = self.epochs[-1] if self.epochs else {}
        last = self.validations[-1] if self.validations else {}
        comparable = [figures for figures in self.validations if figures["step"] > self._best_since]
        best = max(comparable, key=lambda figures: figures["val_acc"], default={})
        at_kept = best if kept == "best.ckpt" else last
        last_accuracies = [figures["val_acc"] for figures in self.validations[-3:]]
        device = trainer.strategy.root_device
        return {
            "train_loss": last_epoch.get("train_loss"),
            "train_acc": last_epoch.get("train_acc"),
            "val_loss": at_kept.get("val_loss"),
            "val_acc": at_kept.get("val_acc"),
            "test_loss": None,
            "test_acc": None,
            "images_per_second": self.images / self.seconds if self.images else None,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seed": data.seed,
            "norm": norm,
            "data_source": data.images.source,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": trainer.precision,
            "processes": trainer.world_size,
            "tested": kept,
            "val_acc_final": last.get("val_acc"),
            "val_acc_best": best.get("val_acc"),
            "val_acc_mean_of_last_3": statistics.mean(last_accuracies) if last_accuracies else None,
            "val_images_from": "test set" if data.validates_on_test_set else "training set",
            "train_seconds": self.seconds,
            **{f"sha256_{name}": digest for name, digest in data.images.sha256.items()},
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: version(name) for name in ("lightning", "torchmetrics")},
            **_commit(),
        }


def kept_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `Records` has put into a checkpoint: `epochs`, `validations` and the rest; nothing without it."""
    return dict(checkpoint.get("callbacks", {}).get(Records.__name__, {}))  # by which Lightning keeps it


def to_json(content: Any) -> str:
    """As JSON, which has no word for NaN and infinity: they become null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [known(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(content), indent=2)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole or not at all."""
    checkpoints.write_whole(path, f"{to_json(content)}\n".encode())


def read_result(run: Path) -> dict[str, Any]:
    """The result.json of a run's folder; nothing where there is none.

    Raises:
        UserError: it is no such file.
    """
    path = run / "result.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is not what a run has written: {error}. Remove it, or run the run again."
        ) from error


def closing_lines(result: dict[str, Any], first_norm: nn.Module) -> str:
    """The lines with which the article ends, for people; the last are the parameters of the first norm layer."""

    def figure(name: str) -> str:
        value = result[name]
        return "none" if value is None else f"{value:.3f}"

    lines = [
        f"train loss {figure('train_loss')}, train acc {figure('train_acc')}, test acc {figure('test_acc')}",
        f"{result['images_per_second'] or 0:,.1f} images/sec on {result['device']}",
    ]
    if result["val_images_from"] == "test set" and result["val_acc_best"] is not None:
        lines.insert(
            1,
            f"test acc after each epoch: final {figure('val_acc_final')}, best {figure('val_acc_best')}, "
            f"mean of the last three {figure('val_acc_mean_of_last_3')}",
        )
    article_names = {"weight": "gamma", "bias": "beta"}
    for name, values in first_norm.named_parameters():
        lines.append(f"{article_names.get(name, name)} of the first norm layer: {_numbers(values.detach().flatten())}")
    return "\n".join(lines)


def _numbers(values: torch.Tensor) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in values.tolist()) + "]"


def _commit() -> dict[str, str]:
    """The commit of the checkout that this code lies in, `-dirty` when it was changed; nothing elsewhere."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a folder where it hangs
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}
