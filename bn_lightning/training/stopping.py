"""Reasons to stop a run early that come from outside: signals and the time limit.

Losses that are not finite are a reason of their own, in `losses`. A callback that watches a metric
sets `trainer.should_stop`, as Lightning's EarlyStopping does.

A stop is a collective decision: if one rank wants to stop, all ranks stop after the same step.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Timer

from bn_lightning.errors import RunFailed
from bn_lightning.training import lightning_internals

# Reading the stop flag synchronizes ranks, and reading a GPU loss blocks the host.
# In both cases it is read every 10 steps only.
CHECK_INTERVAL = 10

# Used beside the numbers of signals.
OUT_OF_TIME = 1_000


class Stopped(SystemExit):
    """The run was asked to stop, and has stopped. The code is 128 + the number of the signal."""


def is_check_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether to check for stop requests before the batch of that number."""
    is_cheap = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
    return is_cheap or batch_idx % CHECK_INTERVAL == 0


class StopRequests:
    """Requests to stop from outside: signals, and `max_time`, counted from `begin`."""

    def __init__(self, max_time: str | timedelta | dict[str, int] | None) -> None:
        self._timer = Timer(max_time, interval="step")
        self._requeue_signal: int | None = None
        self._reason = 0  # a signal's number, or OUT_OF_TIME
        self._noted_at = 0.0

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record signals from now on, instead of Lightning's handlers, which it restores itself."""
        self._timer.on_train_start(trainer, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGINT, signal.SIGTERM}
        environment = lightning_internals.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.add(signal.Signals(self._requeue_signal))

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            # Some send one signal to the process and to its group: two at once count as one.
            if self._reason and now - self._noted_at > 0.3:
                os._exit(128 + number)
            self._reason, self._noted_at = number, now

        for number in numbers:
            signal.signal(number, note)
        # Here all ranks are asked, and less often.
        lightning_internals.disable_sigterm_broadcast(trainer)

    def pending(self, trainer: pl.Trainer) -> int:
        """Return the request of any rank, the same on all of them; 0 for none."""
        left = self._timer.time_remaining()
        reason = self._reason or (OUT_OF_TIME if left is not None and left <= 0 else 0)
        if trainer.world_size > 1:
            own = torch.tensor(reason, device=trainer.strategy.root_device)
            reason = int(trainer.strategy.reduce(own, reduce_op="max"))
        # Setting it to 0 would forget a signal that arrives at this moment.
        if reason:
            self._reason = reason
        return reason

    def stop(self, trainer: pl.Trainer, saved: str) -> NoReturn:
        """End all processes; `saved` says where the run can be resumed from.

        Raises:
            Stopped: always.
        """
        reason = self._reason
        why = "--trainer.max_time" if reason == OUT_OF_TIME else signal.Signals(reason).name
        if trainer.is_global_zero:
            print(f"\nstopped by {why} after step {trainer.global_step:,}; {saved}", flush=True)
            if reason == self._requeue_signal:
                _requeue()
        is_success = reason in (OUT_OF_TIME, self._requeue_signal)
        end_all_ranks(trainer, Stopped(0 if is_success else 128 + reason))

    @property
    def is_out_of_time(self) -> bool:
        """Whether `max_time` ended the run."""
        return self._reason == OUT_OF_TIME


def _requeue() -> None:
    """Ask SLURM to run the job again. Lightning's own handler saves in the middle of a step."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        fault = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        fault = str(error)
    said = f"job {job} was not requeued: {fault}" if fault else f"job {job} is requeued"
    print(said, file=sys.stderr, flush=True)


def end_all_ranks(trainer: pl.Trainer, error: Stopped | RunFailed) -> NoReturn:
    """End each process of a run, where all ranks know the reason: rank 0 reports it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.is_global_zero:
        raise error
    if isinstance(environment, LightningEnvironment):
        # For any other code Lightning would kill rank 0, which may still be writing.
        raise Stopped(0)
    raise Stopped(error.code if isinstance(error, Stopped) else error.exit_code)
