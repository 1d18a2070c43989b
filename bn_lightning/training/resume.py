"""Exact resume: a run that was stopped, however and wherever, goes on as if it had not been.

A checkpoint of Lightning's is written inside a hook, in the middle of a step: what the step has still to do (validate,
log, move a schedule) is then done twice, or never. Here `last.ckpt` is written between two steps, where all of one step
is over and nothing of the next has begun. And nothing hangs on what happened before: the random numbers of a step are a
function of (seed, epoch, batch, process), its images of (seed, epoch, batch).
"""

import functools
import random
import zlib
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.errors import UserError
from bn_lightning.training import checkpoints
from bn_lightning.training.stopping import Losses, Reasons, should_look

_version = functools.cache(version)  # each look at it reads a file, and a checkpoint needs it


class ExactResume(Checkpoint):
    """Writes `last.ckpt` between two steps, and goes on from it exactly: `Trainer(callbacks=[ExactResume()])`.

    It is written before each epoch, when training ends, and when the run is asked to stop, by SIGTERM, Ctrl-C, SLURM's
    signal before it takes a job away, or `max_time`: then the step is finished first. A second signal stops at once.

    Args:
        every_n_train_steps: also write it after so many optimizer steps; 0 for never.
        dirpath: its folder; by default `checkpoints` in the logger's folder, as of ModelCheckpoint.
        seed: of the random numbers of each step (dropout).
        max_time: stop after this time; `Trainer(max_time=...)` would leave out the rest of the epoch. Counted from the
            start of this process's training.

    Attributes:
        path: of `last.ckpt`, known from `setup` on.
        goes_on: whether the run goes on where its checkpoint lies; False when that one begins another run.
        resumed_at: the steps at which the run went on.
        has_trained: whether a batch was trained on in this process.

    Raises:
        Stopped: when asked to stop, with all saved. After `max_time` its code is 0.
        RunFailed: a loss that is not finite.
    """

    def __init__(
        self,
        every_n_train_steps: int = 0,
        dirpath: str | None = None,
        seed: int = 0,
        max_time: str | timedelta | dict[str, int] | None = None,
    ) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.dirpath = dirpath
        self.path = Path(dirpath or "", "last.ckpt")
        self.seed = seed
        self.goes_on = True
        self.resumed_at: list[int] = []
        self.has_trained = False
        self.reasons = Reasons(max_time)
        self._losses = Losses()
        self._saved_at = -1  # the optimizer step of last.ckpt
        self._point: tuple[int, int, bool] | None = None  # while last.ckpt is written: epoch, batches of it, finished
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        by_default = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")  # log_dir asks the first process
        self.dirpath = trainer.strategy.broadcast(self.dirpath or str(by_default))
        self.path = Path(self.dirpath, "last.ckpt")
        if stage == "fit":
            # Between two steps is before the first hook of the next one, and the end behind the last.
            others = [c for c in trainer.callbacks if c is not self and not isinstance(c, _End)]  # type: ignore[attr-defined]
            trainer.callbacks[:] = [self, *others, _End(self)]  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                Path(self.dirpath).mkdir(parents=True, exist_ok=True)

    # Where a run stands, in its checkpoint

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._point is None:
            return
        epoch, batch, finished = self._point
        fit_loop = checkpoint["loops"]["fit_loop"]
        checkpoint["between_steps"] = {
            "batches_that_stepped": fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"],
            # Schedules and callbacks may look at the figures of a validation long ago.
            "callback_metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
            "resumed_at": self.resumed_at,
            "finished": self._limits(trainer) if finished else None,
            "batch": batch,
            "surroundings": _surroundings(trainer),
        }
        # As if the epoch were about to begin, with some batches behind it: then Lightning calls on_train_epoch_start,
        # which prepares what is in no checkpoint (the schedule of StochasticWeightAveraging), and takes the next batch.
        _set_counters(fit_loop["epoch_progress"], total=epoch, current=epoch)
        for tracker in fit_loop["epoch_progress"].values():
            tracker["ready"] += 1
        batches = fit_loop["epoch_loop.batch_progress"]
        _set_counters(batches, total=batches["total"]["completed"], current=batch)
        batches["is_last_batch"] = False
        if batch == 0:
            _set_counters(fit_loop["epoch_loop.val_loop.batch_progress"], total=0, current=0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("between_steps")
        self._refuse_other_batches(trainer, checkpoint)
        if self._restored is not None:
            self._say_what_differs(trainer, self._restored["surroundings"])
            self.resumed_at = [*self._restored["resumed_at"], checkpoint["global_step"]]
            if self.goes_on:
                self._saved_at = checkpoint["global_step"]
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                _bring_up_to_date(state, str(self.path.parent) if self.goes_on else None, checkpoint["global_step"])

    def _refuse_other_batches(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("datamodule_hyper_parameters", {})
        now = getattr(trainer.datamodule, "hparams", {})  # type: ignore[attr-defined]
        reasons = dict.fromkeys(("seed", "val_images"), "images that were trained on would be validated on")
        if self._restored is not None and self._restored["batch"]:
            reasons["batch_size"] = (
                "the run is within an epoch, whose batches would be others (between two it can change)"
            )
        for name, reason in reasons.items():
            if before.get(name) != now.get(name):
                flag = "--seed_everything" if name == "seed" else f"--data.{name}"
                raise UserError(
                    f"{flag} was {before.get(name)} when the run began and is now {now.get(name)}: {reason}.\n"
                    f"Leave it out to go on, or begin a new run, without the checkpoint."
                )

    def _say_what_differs(self, trainer: pl.Trainer, before: dict[str, Any]) -> None:
        now = _surroundings(trainer)
        changed = [f"{name} {now[name]}, before {before.get(name)}" for name in now if now[name] != before.get(name)]
        if changed and trainer.is_global_zero:
            print(f"goes on with {'; '.join(changed)}: the same run up to rounding, not to the bit", flush=True)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is not None and self._restored["finished"] == self._limits(trainer):
            trainer.should_stop = True  # early stopping has ended it, and no checkpoint of Lightning's says so

    @staticmethod
    def _limits(trainer: pl.Trainer) -> list[int | None]:
        return [trainer.max_epochs, trainer.max_steps]

    # Between two steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is not None:
            trainer.callback_metrics.update(self._restored["callback_metrics"])
        self.reasons.begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fit_loop = trainer.fit_loop
        self._between_steps(trainer, fit_loop.epoch_loop.batch_progress.current.ready if fit_loop.restarting else 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._restored["batches_that_stepped"]
            # Else Lightning leaves out the schedules at the end of the epoch. The public name obeys only sometimes.
            trainer.fit_loop._restarting = False
            self._restored = None
        if batch_idx:
            self._between_steps(trainer, batch_idx)
        number = f"{self.seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
        seed = zlib.crc32(number.encode())  # numpy's SeedSequence takes ten times as long
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes half a millisecond where CUDA sleeps
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _between_steps(self, trainer: pl.Trainer, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._saved_at:  # nothing that would be lost
            if should_look(trainer, batch_idx) and self.reasons.are_there(trainer):
                self.reasons.stop(trainer, self.path)
            return
        if batch_idx % trainer.accumulate_grad_batches:
            return  # the gradients of half a step are in no checkpoint
        is_due = batch_idx == 0 or (self.every_n_train_steps and step % self.every_n_train_steps == 0)
        stops = (is_due or should_look(trainer, batch_idx)) and self.reasons.are_there(trainer)
        if is_due or stops:
            self._losses.look(trainer, self.path, self._saved_at)
            self._save(trainer, trainer.current_epoch, batch_idx)
        if stops:
            self.reasons.stop(trainer, self.path)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.has_trained = True
        self._losses.add(trainer, outputs, batch_idx)
        if should_look(trainer, batch_idx + 1) or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._losses.look(trainer, self.path, self._saved_at)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done < trainer.num_training_batches and trainer.global_step != self._saved_at:
            # max_steps has ended the run within an epoch, and a longer one is to go on there.
            self._save(trainer, trainer.current_epoch, done, finished=True)

    def at_the_end(self, trainer: pl.Trainer) -> None:
        """What is left to do when all callbacks have ended the training."""
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches:
            self._save(trainer, trainer.current_epoch, 0, finished=True)
        if self.reasons.are_there(trainer) and not self.reasons.is_out_of_time:
            self.reasons.stop(trainer, self.path)

    def _save(self, trainer: pl.Trainer, epoch: int, batch_idx: int, finished: bool = False) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()  # of what a checkpoint has behind it nothing may be missing
        self._point = (epoch, batch_idx, finished)
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._point = None
        self._saved_at = trainer.global_step


class _End(pl.Callback):
    """The last of all callbacks: some change the weights in their on_train_end."""

    def __init__(self, resume: ExactResume) -> None:
        self.resume = resume

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resume.at_the_end(trainer)


def _surroundings(trainer: pl.Trainer) -> dict[str, Any]:
    """What may change the rounding of a run, and no setting."""
    versions = {name: _version(name) for name in ("torch", "lightning")}
    threads = torch.get_num_threads() * trainer.world_size
    device = trainer.strategy.root_device.type
    return {**versions, "device": device, "processes": trainer.world_size, "threads": threads}


def _set_counters(progress: dict[str, Any], total: int, current: int) -> None:
    """Ready, started, processed and completed, all the same: nothing is under way."""
    for name, value in (("total", total), ("current", current)):
        progress[name] = dict.fromkeys(progress[name], value)


def _bring_up_to_date(state: dict[str, Any], dirpath: str | None, step: int) -> None:
    """Hold the state of a ModelCheckpoint against the folder where the run goes on now, None for that of another run.

    The folder may have moved, and its best checkpoint may be of a later step than the one at which the run goes on.
    """
    before = str(state["dirpath"])

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(before):
            return str(dirpath) + value.removeprefix(before)
        return {moved(k): v for k, v in value.items()} if isinstance(value, dict) else value

    if dirpath is not None and Path(before).name != Path(dirpath).name:
        return  # a place of the user's own
    if dirpath is not None:
        state.update({name: moved(value) for name, value in state.items()})
        best = Path(state["best_model_path"])
        if best.is_file() and checkpoints.load(str(best))[1]["global_step"] <= step:
            return
    state.update(dirpath=dirpath, best_model_score=None, best_k_models={}, kth_best_model_path="")
