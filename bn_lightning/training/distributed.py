"""Distributed training: synchronized buffers, and CPU cores divided among the ranks."""

import contextlib
import os
import sys
from pathlib import Path
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
        if trainer.strategy.root_device.type == "cpu" and sys.platform == "linux":
            _pin_threads_to_cores(trainer)
            _lower_gloo_priority()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, src=0)

    on_test_epoch_start = on_validation_epoch_start


def _pin_threads_to_cores(trainer: pl.Trainer) -> None:
    """Pin the threads of this process to its share of the machine's cores.

    Without this, threads of different ranks migrate to the same core. Nothing is done
    if the
    process sees fewer cores than the machine has: then SLURM, for example, has divided
        them.
    """
    count = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
    cores = sorted(os.sched_getaffinity(0))
    cores_per_rank = len(cores) // count
    if not cores_per_rank or len(cores) != os.cpu_count():
        return
    first = trainer.local_rank * cores_per_rank
    own_cores = cores[first : first + cores_per_rank]
    for thread in Path("/proc/self/task").iterdir():
        # The thread may have ended, or a container may forbid this.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread.name), own_cores)


def _lower_gloo_priority() -> None:
    """Keep gloo's listener thread from preempting the threads that wait for it.

    The listener polls in a busy loop while another thread holds the lock of a
    connection. If it preempts that thread on the only core of the process, the lock is
    held until the next scheduler tick, 4 ms later. This happened in a third of all
    exchanges; they now take 0.2 ms. Under SCHED_BATCH, a thread that wakes up does not
    preempt others.
    """
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
