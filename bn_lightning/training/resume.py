"""Exact resume: a run that was stopped at any point continues as if it had not been stopped.

Lightning writes a checkpoint inside a hook, in the middle of a step. After resuming,
the rest of the step (validation, logging, the scheduler) is executed twice or not at
all. Here `last.ckpt` is written between two steps. The random numbers of a step do not
depend on those of earlier steps (see `seeds`).
"""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.errors import UserError
from bn_lightning.training import (
    checkpoints,
    lightning_internals,
    logged_values,
    optimizer_and_scheduler,
    seeds,
    surroundings,
    unfinished_epoch,
)
from bn_lightning.training.batches import ExactLoader
from bn_lightning.training.exact_data_loader import ExactDataLoader
from bn_lightning.training.losses import NonFiniteLossGuard
from bn_lightning.training.stopping import StopRequests, is_check_due


class ExactResume(Checkpoint):
    """Callback that writes `last.ckpt` between two steps, and resumes from it exactly.

    Use it as `Trainer(callbacks=[ExactResume()])`. It writes `last.ckpt` before each
    epoch, when
    training ends, and when the run is stopped: by SIGTERM, by Ctrl-C, by the signal
    that SLURM sends before it preempts a job, or by `max_time`. The current step is
    finished first. A second signal stops the run immediately.

    If the training loader is not an `ExactLoader`, for example a plain DataLoader,
    `last.ckpt` is written only at the end of each epoch. Then a resumed run is
    bit-identical if the loader has a length and takes all random numbers from the
    global generators, also with several workers.

    Args:
        every_n_train_steps: also write `last.ckpt` every n optimizer steps; 0 for
            never.
        dirpath: folder of `last.ckpt`; by default `checkpoints` in the logger's folder,
            as in ModelCheckpoint.
        seed: seed of the random numbers in each step, such as those of dropout.
        max_time: time limit, counted from the start of training in this process. Unlike
            with `Trainer(max_time=...)`, a resumed run trains the rest of the
            interrupted epoch.

    Attributes:
        path: path of `last.ckpt`, set in `setup`.
        resuming: whether the run resumes in the folder of its checkpoint; False if the
            checkpoint starts a new run.
        resumed_at: the steps at which the run was resumed.
        has_trained: whether this process has trained on a batch.

    Raises:
        Stopped: a signal or `max_time` stopped the run. The message states what was
            saved. The exit code after `max_time` is 0.
        RunFailed: a loss is NaN or infinite.
        UserError: the training loader is an `ExactDataLoader` without a trainer.
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
        self.resuming = True
        self.has_trained = False
        self.stop_requests = StopRequests(max_time)
        self._is_exact = True
        # Set only while last.ckpt is written: epoch, batches done in it, and whether
        # training has ended.
        self._position: tuple[int, int, bool] | None = None
        self._reset()

    def _reset(self) -> None:
        """Discard what an earlier fit has left."""
        self.resumed_at: list[int] = []
        self._losses = NonFiniteLossGuard()
        self._saved_at = -1  # optimizer step of last.ckpt
        self._restored: dict[str, Any] | None = None
        self._restored_metrics: unfinished_epoch.States = {}
        self._optimization: optimizer_and_scheduler.Names = {}
        self._optimization_before: optimizer_and_scheduler.Names = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Reading `log_dir` is a collective operation, so all ranks read it.
        default_dirpath = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        # `dirpath` itself stays None, because a later fit may have another folder.
        dirpath = trainer.strategy.broadcast(self.dirpath or str(default_dirpath))
        self.path = Path(dirpath, "last.ckpt")
        if stage == "fit":
            self._reset()
            # A checkpoint between two steps is written before any other callback starts
            # the next step or ends the epoch. The final one is written after all other
            # callbacks have finished.
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            helpers = (_EarlySave, FinalSave)
            others = [c for c in callbacks if c is not self and not isinstance(c, helpers)]
            callbacks[:] = [self, _EarlySave(self), *others, FinalSave(self)]
            if trainer.is_global_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)

    # The position in a checkpoint

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["optimization"] = self._optimization
        # Within a hook, such as the end of a validation, metrics need not be complete.
        checkpoint["train_metrics"] = {}
        if self._position is None:
            return
        metrics = {**unfinished_epoch.metrics_of(pl_module), **logged_values.of(trainer)}
        metrics = unfinished_epoch.updated(metrics, trainer.world_size)
        saved = unfinished_epoch.save(metrics, trainer.world_size)
        # After a resume, some values may not have been logged again yet.
        checkpoint["train_metrics"] = self._restored_metrics | saved
        epoch, batch, finished = self._position
        checkpoint["between_steps"] = {
            "batches_that_stepped": lightning_internals.batches_that_stepped(checkpoint),
            # Schedulers and callbacks may read the metrics of an earlier validation.
            "callback_metrics": {n: value.cpu() for n, value in trainer.callback_metrics.items()},
            "resumed_at": self.resumed_at,
            "finished": self._limits(trainer) if finished else None,
            # After a time limit, a run is not finished, but tested.
            "is_tested": finished or self.stop_requests.is_out_of_time,
            "batch": batch,
            "surroundings": surroundings.of(trainer),
        }
        lightning_internals.write_position(checkpoint, epoch, batch)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("between_steps")
        self._restored_metrics = checkpoint.get("train_metrics", {})
        self._optimization_before = optimizer_and_scheduler.in_checkpoint(checkpoint)
        self._refuse_other_batches(trainer, checkpoint)
        if self._restored is not None:
            surroundings.report_differences(trainer, self._restored["surroundings"])
            self.resumed_at = [*self._restored["resumed_at"], checkpoint["global_step"]]
            if self.resuming:
                self._saved_at = checkpoint["global_step"]
        folder = str(self.path.parent) if self.resuming else None
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                _update_model_checkpoint(state, folder, checkpoint["global_step"])

    def _refuse_other_batches(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        before = checkpoint.get("datamodule_hyper_parameters", {})
        now = getattr(data, "hparams", {})
        reasons = dict(getattr(data, "fixed_settings", {}))
        if self._restored is not None and self._restored["batch"]:
            reasons["batch_size"] = (
                "the checkpoint is in the middle of an epoch, and the batches of this epoch would "
                "change"
            )
        for name, reason in reasons.items():
            if before.get(name) != now.get(name):
                flag = "--seed_everything" if name == "seed" else f"--data.{name}"
                raise UserError(
                    f"{flag} was {before.get(name)} when the run started and is now "
                    f"{now.get(name)}.\nIt cannot be changed: {reason}.\n"
                    "Remove the setting to resume, or start a new run without the checkpoint."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Callbacks may replace the schedulers later.
        self._optimization = optimizer_and_scheduler.of(trainer)
        optimizer_and_scheduler.refuse_others(self._optimization, self._optimization_before)
        if self._restored is not None and self._restored["finished"] == self._limits(trainer):
            # The run had already ended, possibly by early stopping. Lightning does not
            # save `should_stop`.
            trainer.should_stop = True

    @staticmethod
    def _limits(trainer: pl.Trainer) -> list[int | None]:
        return [trainer.max_epochs, trainer.max_steps]

    # Between two steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_exact = isinstance(trainer.train_dataloader, ExactLoader)
        if not self._is_exact and trainer.is_global_zero:
            kind = type(trainer.train_dataloader).__name__
            print(
                f"The training loader ({kind}) cannot be resumed within an epoch. last.ckpt is "
                "written only at the end of each epoch. A resumed run is bit-identical only if the "
                "loader has a length and no generator of its own.\n"
                "bn_lightning.ExactDataLoader loads the same Dataset, and is resumed at any batch.",
                flush=True,
            )
        _refuse_loader_without_trainer(trainer)
        if self._restored is not None:
            trainer.callback_metrics.update(self._restored["callback_metrics"])
        metrics = unfinished_epoch.metrics_of(pl_module)
        for metric in metrics.values():
            # An earlier fit, or a callback that also trains, may have left values.
            metric.reset()
        rank, world_size = trainer.global_rank, trainer.world_size
        unfinished_epoch.restore(metrics, self._restored_metrics, rank, world_size)
        self._restored_metrics = {
            key: value
            for key, value in self._restored_metrics.items()
            if key.startswith(logged_values.PREFIX)
        }
        lightning_internals.call_before_fetches(trainer, partial(self._seed_fetch, trainer))
        self.stop_requests.begin(trainer, pl_module)

    def _seed_fetch(self, trainer: pl.Trainer, batch_idx: int) -> None:
        # Saves 15 us per step.
        if getattr(trainer.train_dataloader, "is_random", True):
            device, rank = trainer.strategy.root_device, trainer.global_rank
            seeds.seed_fetch(self.seed, trainer.current_epoch, batch_idx, rank, device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._between_steps(trainer, lightning_internals.first_batch(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored is not None:
            lightning_internals.end_restart(trainer, self._restored["batches_that_stepped"])
            self._restored = None
        self._add_logged_values(trainer)
        if batch_idx:
            self._between_steps(trainer, batch_idx)
        device = trainer.strategy.root_device
        seeds.seed_step(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank, device)

    def _add_logged_values(self, trainer: pl.Trainer) -> None:
        if self._restored_metrics:
            self._restored_metrics = logged_values.add(trainer, self._restored_metrics)

    def _between_steps(self, trainer: pl.Trainer, batch_idx: int) -> None:
        step = trainer.global_step
        is_unsaved = step != self._saved_at
        # A checkpoint does not contain accumulated gradients, so none is written before
        # they are applied.
        if is_unsaved and batch_idx % trainer.accumulate_grad_batches:
            return
        save_due = is_unsaved and self._is_save_due(step, batch_idx)
        check_due = save_due or is_check_due(trainer, batch_idx)
        stopping = check_due and bool(self.stop_requests.pending(trainer))
        if save_due or (stopping and is_unsaved and self._can_save_at(batch_idx)):
            self._losses.check(trainer, self.path, self._saved_at)
            self._save(trainer, trainer.current_epoch, batch_idx)
        if stopping:
            self._stop(trainer)

    def _is_save_due(self, step: int, batch_idx: int) -> bool:
        every = self.every_n_train_steps
        is_step_due = bool(every) and step % every == 0
        return batch_idx == 0 or (is_step_due and self._can_save_at(batch_idx))

    def _can_save_at(self, batch_idx: int) -> bool:
        return self._is_exact or batch_idx == 0

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._saved_at == trainer.global_step:
            saved = f"progress is saved in {self.path}"
        elif self._saved_at >= 0:
            saved = f"progress up to step {self._saved_at:,} is saved in {self.path}"
        else:
            saved = "no checkpoint was saved"
        self.stop_requests.stop(trainer, saved)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.has_trained = True
        self._losses.add(trainer, outputs, batch_idx)
        if is_check_due(trainer, batch_idx + 1) or lightning_internals.is_last_batch(trainer):
            self._losses.check(trainer, self.path, self._saved_at)

    def save_within_epoch(self, trainer: pl.Trainer) -> None:
        """Save the state if the run ends within an epoch, before any hook ends the epoch."""
        self._add_logged_values(trainer)
        self._restored_metrics = {}
        is_unsaved = trainer.global_step != self._saved_at
        if is_unsaved and not lightning_internals.is_epoch_done(trainer):
            # max_steps ended the run within an epoch. A longer run resumes from here.
            done = lightning_internals.batches_done(trainer)
            self._save(trainer, trainer.current_epoch, done, finished=True)

    def save_at_end(self, trainer: pl.Trainer) -> None:
        """Save the state after all callbacks have finished."""
        if lightning_internals.is_epoch_done(trainer):
            self._save(trainer, trainer.current_epoch, 0, finished=True)
        if self.stop_requests.pending(trainer) and not self.stop_requests.is_out_of_time:
            self._stop(trainer)

    def _save(
        self, trainer: pl.Trainer, epoch: int, batch_idx: int, finished: bool = False
    ) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # All events up to a checkpoint must be on disk when a run resumes from
                # it.
                logger.experiment.flush()
        self._position = (epoch, batch_idx, finished)
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._position = None
        self._saved_at = trainer.global_step


class _EarlySave(pl.Callback):
    """Saves a run that ends within an epoch.

    At the end of an epoch, Lightning calls `ExactResume`, a Checkpoint, after the
    module, which may have reset its metrics.
    """

    def __init__(self, resume: ExactResume) -> None:
        self.resume = resume

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resume.save_within_epoch(trainer)


class FinalSave(pl.Callback):
    """Saves the final checkpoint after all other callbacks, which may change the weights."""

    def __init__(self, resume: ExactResume) -> None:
        self.resume = resume

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.resume.save_at_end(trainer)


def _refuse_loader_without_trainer(trainer: pl.Trainer) -> None:
    loader = trainer.train_dataloader
    if isinstance(loader, ExactDataLoader) and loader.trainer is None:
        raise UserError(
            "The training loader, an ExactDataLoader, has no trainer. It would return the samples "
            "of the first epoch in each epoch, to each process, also when the run is resumed.\n"
            "Create it with ExactDataLoader(..., trainer=self.trainer)."
        )


def _update_model_checkpoint(state: dict[str, Any], dirpath: str | None, step: int) -> None:
    """Adapt the state of a ModelCheckpoint to the folder in which the run resumes.

    The folder may have moved. Its best checkpoint may be from a later step than the one
    from which the run resumes; then it is removed from the state.

    Args:
        dirpath: the folder; None if the checkpoint starts a new run.
        step: the step from which the run resumes.
    """
    before = str(state["dirpath"])

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(before):
            return str(dirpath) + value.removeprefix(before)
        return {moved(k): v for k, v in value.items()} if isinstance(value, dict) else value

    if dirpath is not None and Path(before).name != Path(dirpath).name:
        return  # the user has set another folder
    if dirpath is not None:
        state.update({name: moved(value) for name, value in state.items()})
        best = Path(state["best_model_path"])
        if best.is_file() and checkpoints.load(str(best))[1]["global_step"] <= step:
            return
    state.update(dirpath=dirpath, best_model_score=None, best_k_models={}, kth_best_model_path="")
