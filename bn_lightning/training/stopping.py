"""Why a run stops before its end: a signal, the time, or a loss that is no number.

What one process knows all have to know, and they end together.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from bn_lightning.errors import RunFailed

# With several processes, or a loss on another device, looking costs: then it is done at each step of this number.
LOOK_EVERY = 10
OUT_OF_TIME = 1_000  # beside the numbers of signals


class Stopped(SystemExit):
    """The run was asked to stop, and has, with all of it in `last.ckpt`. The code is 128 + the signal's number."""


def should_look(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether to ask for reasons to stop before the batch of that number."""
    is_cheap = trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu"
    return is_cheap or batch_idx % LOOK_EVERY == 0


class Reasons:
    """Reasons to stop that come from outside: signals, and `max_time`, counted from `begin`."""

    def __init__(self, max_time: str | timedelta | dict[str, int] | None) -> None:
        self._timer = Timer(max_time, interval="step")
        self._requeue_signal: int | None = None
        self._reason = 0  # a signal's number, or OUT_OF_TIME
        self._noted_at = 0.0

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note signals from here on, in the place of Lightning's handlers, which it takes back itself at the end."""
        self._timer.on_train_start(trainer, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {signal.SIGINT, signal.SIGTERM}
        environment = trainer._accelerator_connector.cluster_environment  # that of Lightning's own handlers
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.add(signal.Signals(self._requeue_signal))

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._reason and now - self._noted_at > 0.3:  # some send one to the process and to its group
                os._exit(128 + number)
            self._reason, self._noted_at = number, now

        for number in numbers:
            signal.signal(number, note)
        # Lightning asks the first process at each step whether it has had a SIGTERM; here all are asked, less often.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def are_there(self, trainer: pl.Trainer) -> int:
        """The reason of any process, the same in all of them; 0 for none."""
        left = self._timer.time_remaining()
        reason = self._reason or (OUT_OF_TIME if left is not None and left <= 0 else 0)
        if trainer.world_size > 1:
            mine = torch.tensor(reason, device=trainer.strategy.root_device)
            reason = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if reason:  # else a signal of this very moment would be forgotten
            self._reason = reason
        return reason

    def stop(self, trainer: pl.Trainer, path: Path) -> NoReturn:
        """End all processes, with all that they have done in the checkpoint at `path`.

        Raises:
            Stopped: always.
        """
        reason = self._reason
        why = "--trainer.max_time" if reason == OUT_OF_TIME else signal.Signals(reason).name
        if trainer.is_global_zero:
            print(f"\nstopped by {why} after step {trainer.global_step:,}; all of it is in {path}", flush=True)
            if reason == self._requeue_signal:
                _requeue()
        _end_together(trainer, Stopped(0 if reason in (OUT_OF_TIME, self._requeue_signal) else 128 + reason))

    @property
    def is_out_of_time(self) -> bool:
        """Whether it was `max_time` that ended the run."""
        return self._reason == OUT_OF_TIME


class Losses:
    """The losses of the steps, looked at where that is cheap."""

    def __init__(self) -> None:
        self._unseen: list[tuple[int, int, int, Tensor]] = []  # epoch, batch, step, loss

    def add(self, trainer: pl.Trainer, outputs: Any, batch_idx: int) -> None:
        """Keep what a training step has given: a loss, or a dict with one."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._unseen.append((trainer.current_epoch, batch_idx, trainer.global_step, loss.detach()))

    def look(self, trainer: pl.Trainer, path: Path, saved_at: int) -> None:
        """Stop where a loss is not finite: what is trained from there on is lost, and no checkpoint may be written.

        `path` is that of the last good checkpoint and `saved_at` its step, -1 where there is none yet.

        Raises:
            RunFailed: a loss is not finite; the message names it, and failure.json all its images.
        """
        if not self._unseen:
            return
        losses, self._unseen = self._unseen, []
        if len(losses) == 1 and trainer.world_size == 1 and math.isfinite(losses[0][-1]):
            return  # the ordinary case, in a tenth of the time
        is_bad = ~torch.stack([loss for *_, loss in losses]).isfinite()
        if trainer.world_size > 1:
            is_bad = trainer.strategy.reduce(is_bad.int(), reduce_op="max").bool()
        if not is_bad.any():
            return
        run = path.parent.parent
        epoch, batch_idx, step, loss = losses[int(is_bad.int().argmax())]
        what = f"The loss is {float(loss)}" if not loss.isfinite() else "The loss of another process is not finite"
        said = [f"{what} in step {step:,}: epoch {epoch + 1}, batch {batch_idx + 1} of it."]
        order = getattr(trainer.datamodule, "train_order", None)  # type: ignore[attr-defined]
        if order is not None:
            size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            images = order(epoch)[batch_idx * size : (batch_idx + 1) * size].tolist()
            said.append(f"Its images, by their numbers in the training set: {', '.join(map(str, images[:8]))}, ...")
            if trainer.is_global_zero and run.is_dir():
                file = run / "failure.json"
                file.write_text(json.dumps({"step": step, "epoch": epoch, "batch": batch_idx, "images": images}) + "\n")
                said.append(f"All {len(images)} of them are in {file}")
        if saved_at >= 0:
            said += [
                f"The last good checkpoint is of step {saved_at:,}: {path}",
                f"Go on from there with another setting: fit --resume {run} --model.lr 0.1",
            ]
        _end_together(trainer, RunFailed("\n".join(said)))


def _end_together(trainer: pl.Trainer, error: Stopped | RunFailed) -> NoReturn:
    """End each process of a run, where all of them know why: the first one says it."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.is_global_zero:
        raise error
    if isinstance(environment, LightningEnvironment):
        raise Stopped(0)  # for any other code Lightning would kill the first process, which may still be writing
    raise Stopped(error.code if isinstance(error, Stopped) else error.exit_code)


def _requeue() -> None:
    """Ask SLURM to run the job once more, as Lightning's handler does, which saves in the middle of a step."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        fault = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        fault = str(error)
    print(f"job {job} was not requeued: {fault}" if fault else f"job {job} is requeued", file=sys.stderr, flush=True)
