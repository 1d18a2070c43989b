"""Distributed training: the same data, settings and buffers on all ranks."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bn_lightning.norms import recognition
from bn_lightning.training.agreement import refuse_ranks_that_differ


class DistributedTraining(pl.Callback):
    """Reduces the cost of training with several processes. With one process it does nothing.

    It refuses a run whose ranks start from different states (see `agreement`).

    A run uses the running statistics of rank 0. DistributedDataParallel broadcasts them
    before each step, although most norm layers do not read them in training. This
    callback broadcasts them before each validation instead. So validation metrics do
    not depend on whether the run was resumed.

    It must come after callbacks that swap the weights for validation, such as weight
    averaging.
    """

    def __init__(self) -> None:
        self._resumes_at = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumes_at = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        refuse_ranks_that_differ(trainer, pl_module, self._resumes_at)
        model = trainer.strategy.model
        only_written = recognition.only_writes_running_stats(pl_module)
        if isinstance(model, DistributedDataParallel) and only_written:
            model.broadcast_buffers = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, src=0)

    on_test_epoch_start = on_validation_epoch_start
