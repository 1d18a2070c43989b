"""Early stopping of a run by a signal or the time limit.

A stop is a collective decision: if one rank has to stop, all ranks stop after the same
step.

Other reasons to stop are handled elsewhere. Non-finite losses are handled in `losses`.
A callback that stops a run by a metric sets `trainer.should_stop`, as Lightning's
EarlyStopping does.
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

from bn_lightning.errors import UserError
from bn_lightning.training import lightning_internals

# Exchanging stop requests synchronizes the ranks, and reading a loss on a GPU blocks
# the host. In both cases, the check is made only every 10 batches.
CHECK_INTERVAL = 10

# The stop reason of the time limit. Other stop reasons are signal numbers.
OUT_OF_TIME = 1_000


class Stopped(SystemExit):
    """The exit of a run that was stopped by a request.

    On rank 0, the exit code is 0 after the time limit or SLURM's requeue signal.
    After any other signal, it is 128 + the signal number.
    """


def is_check_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Return whether stop requests have to be checked before a batch."""
    is_cheap = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
    return is_cheap or batch_idx % CHECK_INTERVAL == 0


class StopRequests:
    """Requests to stop a run.

    Args:
        max_time: time limit, counted from the call of `begin`; None for no limit.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None) -> None:
        self._timer = Timer(max_time, interval="step")
        self._requeue_signal: int | None = None
        self._reason = 0  # a signal number, OUT_OF_TIME, or 0 without a request
        self._received_at: float | None = None  # the time of this process's first signal

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the timer, and replace Lightning's signal handlers.

        Lightning restores the original handlers at the end of the run. A second signal
        ends the process at once. Requests from before are discarded.
        """
        self._reason, self._received_at = 0, None
        self._timer.on_train_start(trainer, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGINT, signal.SIGTERM}
        environment = lightning_internals.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.add(signal.Signals(self._requeue_signal))

        def record(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            # Some programs send a signal both to the process and to its group. Two
            # signals within 0.3 s therefore count as one.
            if self._received_at is not None and now - self._received_at > 0.3:
                os._exit(128 + number)
            self._reason, self._received_at = number, now

        for number in numbers:
            signal.signal(number, record)
        # `pending` replaces this broadcast, and communicates less often.
        lightning_internals.disable_sigterm_broadcast(trainer)

    def pending(self, trainer: pl.Trainer) -> int:
        """Return a stop reason if any rank has one, otherwise 0.

        All ranks must call this. All of them get the same value.
        """
        left = self._timer.time_remaining()
        reason = self._reason or (OUT_OF_TIME if left is not None and left <= 0 else 0)
        if trainer.world_size > 1:
            own = torch.tensor(reason, device=trainer.strategy.root_device)
            reason = int(trainer.strategy.reduce(own, reduce_op="max"))
        # Assigning 0 would discard a signal that arrives at this moment.
        if reason:
            self._reason = reason
        return reason

    def stop(self, trainer: pl.Trainer, saved: str) -> NoReturn:
        """End all processes of the run.

        Args:
            saved: part of the message, which states what was saved and where.

        Raises:
            Stopped: always.
        """
        reason = self._reason
        why = "--trainer.max_time" if reason == OUT_OF_TIME else signal.Signals(reason).name
        if trainer.is_global_zero:
            print(f"\nStopped by {why} after step {trainer.global_step:,}; {saved}", flush=True)
            if reason == self._requeue_signal:
                _requeue()
        is_success = reason in (OUT_OF_TIME, self._requeue_signal)
        end_all_ranks(trainer, Stopped(0 if is_success else 128 + reason))

    @property
    def is_out_of_time(self) -> bool:
        """Whether the stop reason is the time limit."""
        return self._reason == OUT_OF_TIME


def _requeue() -> None:
    """Requeue the SLURM job.

    Lightning's own handler is not used, because it would save a checkpoint in the
    middle of a step.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        fault = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        fault = str(error)
    if fault:
        message = f"SLURM job {job} was not requeued: {fault}"
    else:
        message = f"SLURM job {job} was requeued"
    print(message, file=sys.stderr, flush=True)


def end_all_ranks(trainer: pl.Trainer, error: Stopped | UserError) -> NoReturn:
    """End the process on each rank. Every rank must call this with the same error.

    Raises:
        Stopped | UserError: `error` on rank 0, which reports it; Stopped on other
        ranks.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.is_global_zero:
        raise error
    if isinstance(environment, LightningEnvironment):
        # With any other exit code, Lightning would kill rank 0, which may still be
        # writing files.
        raise Stopped(0)
    raise Stopped(error.code if isinstance(error, Stopped) else error.exit_code)
