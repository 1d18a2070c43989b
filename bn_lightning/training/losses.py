"""Detection of losses that are NaN or infinite."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from bn_lightning.errors import RunFailed
from bn_lightning.training.batches import ShardedBatches
from bn_lightning.training.stopping import end_all_ranks

# Written to the run folder when a non-finite loss ends the run.
FAILURE = "failure.json"


class NonFiniteLossGuard:
    """A buffer of losses that are checked together, because reading a GPU loss blocks the host."""

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, int, int, Tensor]] = []  # (epoch, batch, step, loss)

    def add(self, trainer: pl.Trainer, outputs: Any, batch_idx: int) -> None:
        """Add the output of a training step: a loss, a dict with the entry `loss`, or neither.

        A step may skip its batch, and with manual optimization it need not return a loss.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            # A finite value, so that all ranks have the same number of losses.
            loss = torch.zeros((), device=trainer.strategy.root_device)
        position = (trainer.current_epoch, batch_idx, trainer.global_step)
        self._unchecked.append((*position, loss.detach()))

    def check(self, trainer: pl.Trainer, path: Path, saved_at: int) -> None:
        """End the run if a loss is not finite, before a checkpoint contains such weights.

        Args:
            path: the last good checkpoint.
            saved_at: the step of that checkpoint; -1 if there is none.

        Raises:
            RunFailed: a loss is not finite. failure.json lists the samples of the
                batch.
        """
        if not self._unchecked:
            return
        losses, self._unchecked = self._unchecked, []
        # The common case, ten times as fast as the general one.
        if len(losses) == 1 and trainer.world_size == 1 and math.isfinite(losses[0][-1]):
            return
        is_bad = ~torch.stack([loss for *_, loss in losses]).isfinite()
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.int(), reduce_op="max").bool()
        if not is_bad.any():
            return
        epoch, batch_idx, step, loss = losses[int(is_bad.int().argmax())]
        run = path.parent.parent
        if loss.isfinite():
            what = "The loss of another rank is not finite"
        else:
            what = f"The loss is {float(loss)}"
        lines = [
            f"{what} at step {step:,} (epoch {epoch + 1}, batch {batch_idx + 1}).",
            *_write_failure(trainer, run, epoch, batch_idx, step),
        ]
        if saved_at >= 0:
            lines += [
                f"The last good checkpoint is from step {saved_at:,}: {path}",
                "Resume from it with another setting, for example "
                f"fit --resume {run} --model.lr 0.1",
            ]
        else:
            lines.append(
                "This run has no checkpoint yet. Start a new run with another setting, for example "
                "a smaller --model.lr."
            )
        end_all_ranks(trainer, RunFailed("\n".join(lines)))


def _write_failure(
    trainer: pl.Trainer, run: Path, epoch: int, batch_idx: int, step: int
) -> list[str]:
    """Write failure.json to the run folder, and return lines on the samples for the message."""
    failure: dict[str, Any] = {"step": step, "epoch": epoch, "batch": batch_idx}
    lines = []
    loader = trainer.train_dataloader
    if isinstance(loader, ShardedBatches):
        order = loader.current_epoch().order
        batch = slice(batch_idx * loader.batch_size, (batch_idx + 1) * loader.batch_size)
        failure["samples"] = order[batch].tolist()
        shown = ", ".join(map(str, failure["samples"][:8]))
        lines.append(f"Indices of the batch's samples in the training set: {shown}, ...")
    if trainer.is_global_zero and run.is_dir():
        file = run / FAILURE
        file.write_text(json.dumps(failure) + "\n")
        lines.append(f"The complete list is in {file}")
    return lines
