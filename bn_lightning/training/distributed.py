"""Several processes that train together: equal buffers, and CPU cores shared without waste."""

import contextlib
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bn_lightning.norms import recognition


class DistributedTraining(pl.Callback):
    """Makes several processes train as one, at little cost. With one process it does nothing.

    The running statistics of a run are those of rank 0. DistributedDataParallel sends them to the
    other ranks before each step, although most norm layers do not read them there. Here they are
    sent before each validation. So a validation gives the same metrics whether or not the run was
    resumed in between.

    It has to come after callbacks that exchange the weights for validation, such as averages.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        model = trainer.strategy.model
        only_written = recognition.only_writes_running_stats(pl_module)
        if isinstance(model, DistributedDataParallel) and only_written:
            model.broadcast_buffers = False
        if trainer.strategy.root_device.type == "cpu" and sys.platform == "linux":
            _keep_to_own_cores(trainer)
            _let_gloo_wait()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for buffer in pl_module.buffers():
                dist.broadcast(buffer, src=0)

    on_test_epoch_start = on_validation_epoch_start


def _keep_to_own_cores(trainer: pl.Trainer) -> None:
    """Divide the cores among the processes of this machine, as their threads are: moved about, they take each other's.

    Not where something else has divided them (SLURM): the processes then see fewer cores than the machine has.
    """
    count = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    if share and len(cores) == os.cpu_count():
        first = trainer.local_rank * share
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(
                OSError
            ):  # a thread that has just ended, or a container that forbids it
                os.sched_setaffinity(int(thread.name), cores[first : first + share])


def _let_gloo_wait() -> None:
    """Have gloo's thread that listens to the other processes not push away the threads that it works for.

    While another thread of its process holds a connection's lock, it does not sleep but asks again and again. Where it
    has pushed that thread from the only core of the process, the lock is let go at the scheduler's next tick, 4 ms
    later: a third of all exchanges took that long, and 0.2 ms now. Under SCHED_BATCH a thread that wakes pushes none
    away.
    """
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().strip() == "gloo_tcp_loop":
                os.sched_setscheduler(int(thread.name), os.SCHED_BATCH, os.sched_param(0))
