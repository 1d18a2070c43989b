"""The guard against losses that are NaN or infinite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bn_lightning.errors import RunFailed
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import end_all_ranks

# Written into the folder of a run that a non-finite loss has ended.
FAILURE = "failure.json"


class NonFiniteLossGuard:
    """Collects the losses of the steps, and checks them where that is cheap."""

    def __init__(self) -> None:
        self._unseen: list[tuple[int, int, int, Tensor]] = []  # epoch, batch, step, loss

    def add(self, trainer: pl.Trainer, outputs: Any, batch_idx: int) -> None:
        """Keep what a training step has returned: a loss, or a dict with one."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            step = trainer.global_step
            self._unseen.append((trainer.current_epoch, batch_idx, step, loss.detach()))

    def check(self, trainer: pl.Trainer, path: Path, saved_at: int) -> None:
        """End the run where a loss is not finite: no checkpoint of such weights may be written.

        `path` is that of the last good checkpoint and `saved_at` its step, -1 without one.

        Raises:
            RunFailed: a loss is not finite. The message names it, and failure.json its samples.
        """
        if not self._unseen:
            return
        losses, self._unseen = self._unseen, []
        # The common case, in a tenth of the time.
        if len(losses) == 1 and trainer.world_size == 1 and math.isfinite(losses[0][-1]):
            return
        is_bad = ~torch.stack([loss for *_, loss in losses]).isfinite()
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.int(), reduce_op="max").bool()
        if not is_bad.any():
            return
        epoch, batch_idx, step, loss = losses[int(is_bad.int().argmax())]
        on_this_rank = not loss.isfinite()
        what = (
            f"The loss is {float(loss)}"
            if on_this_rank
            else "The loss of another rank is not finite"
        )
        lines = [
            f"{what} in step {step:,}: epoch {epoch + 1}, batch {batch_idx + 1} of it.",
            *_record(trainer, path.parent.parent, epoch, batch_idx, step),
        ]
        if saved_at >= 0:
            lines += [
                f"The last good checkpoint is of step {saved_at:,}: {path}",
                "Resume from there with another setting: "
                f"fit --resume {path.parent.parent} --model.lr 0.1",
            ]
        end_all_ranks(trainer, RunFailed("\n".join(lines)))


def _record(trainer: pl.Trainer, run: Path, epoch: int, batch_idx: int, step: int) -> list[str]:
    """Write failure.json into the run's folder, and return what the message says of the samples."""
    failure: dict[str, Any] = {"step": step, "epoch": epoch, "batch": batch_idx}
    lines = []
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, DataModule) and hasattr(data, "train_indices"):
        batch = slice(batch_idx * data.batch_size, (batch_idx + 1) * data.batch_size)
        failure["samples"] = data.train_order(epoch)[batch].tolist()
        shown = ", ".join(map(str, failure["samples"][:8]))
        lines.append(f"Its samples, by their indices in the training set: {shown}, ...")
    if trainer.is_global_zero and run.is_dir():
        file = run / FAILURE
        file.write_text(json.dumps(failure) + "\n")
        lines.append(f"The whole batch is in {file}")
    return lines
