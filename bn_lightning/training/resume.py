"""Exact resume: a run that was stopped, at any point, continues as if it had not been stopped.

Lightning writes a checkpoint inside a hook, in the middle of a step: what remains of the step
(validation, logging, a schedule) then happens twice or never. Here `last.ckpt` is written between
two steps, when one is finished and the next has not begun. Nothing depends on earlier random
numbers: see `seeds`.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from bn_lightning.errors import UserError
from bn_lightning.training import checkpoints, lightning_internals, seeds, surroundings
from bn_lightning.training.batches import ExactLoader
from bn_lightning.training.losses import NonFiniteLossGuard
from bn_lightning.training.stopping import StopRequests, is_check_due


class ExactResume(Checkpoint):
    """Writes `last.ckpt` between two steps, and resumes from it exactly.

    `Trainer(callbacks=[ExactResume()])`. It is written before each epoch, when training ends, and
    when the run is asked to stop, by SIGTERM, Ctrl-C, SLURM's signal before it takes a job away, or
    `max_time`: then the step is finished first. A second signal stops at once.

    With a training loader that is no `ExactLoader`, such as a plain DataLoader, a resumed run is
    not identical. Then `last.ckpt` is written at the ends of epochs only.

    Args:
        every_n_train_steps: also write it after so many optimizer steps; 0 for never.
        dirpath: its folder; by default `checkpoints` in the logger's folder, as for
            ModelCheckpoint.
        seed: of the random numbers of each step (dropout).
        max_time: stop after this time; `Trainer(max_time=...)` would leave out the rest of the
            epoch. Counted from the start of this process's training.

    Attributes:
        path: of `last.ckpt`, known from `setup` on.
        resuming: whether the run resumes in the folder of its checkpoint; False when the checkpoint
            starts another run.
        resumed_at: the steps at which the run was resumed.
        has_trained: whether a batch was trained on in this process.

    Raises:
        Stopped: when asked to stop, with everything saved. After `max_time` its code is 0.
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
        self.resuming = True
        self.resumed_at: list[int] = []
        self.has_trained = False
        self.stop_requests = StopRequests(max_time)
        self._losses = NonFiniteLossGuard()
        self._saved_at = -1  # the optimizer step of last.ckpt
        self._is_exact = True
        # Set while last.ckpt is written: epoch, batches of it, whether training has ended.
        self._point: tuple[int, int, bool] | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # `log_dir` is a collective, so all ranks ask for it.
        by_default = Path(trainer.log_dir or trainer.default_root_dir, "checkpoints")
        self.dirpath = trainer.strategy.broadcast(self.dirpath or str(by_default))
        self.path = Path(self.dirpath, "last.ckpt")
        if stage == "fit":
            # Between two steps is before the first hook of the next one. The end is after the last
            # hook of all callbacks.
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            others = [c for c in callbacks if c is not self and not isinstance(c, _End)]
            callbacks[:] = [self, *others, _End(self)]
            if trainer.is_global_zero:
                Path(self.dirpath).mkdir(parents=True, exist_ok=True)

    # The position of a run, in its checkpoint

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._point is None:
            return
        epoch, batch, finished = self._point
        checkpoint["between_steps"] = {
            "batches_that_stepped": lightning_internals.batches_that_stepped(checkpoint),
            # Schedules and callbacks may read the metrics of an earlier validation.
            "callback_metrics": {n: value.cpu() for n, value in trainer.callback_metrics.items()},
            "resumed_at": self.resumed_at,
            "finished": self._limits(trainer) if finished else None,
            "batch": batch,
            "surroundings": surroundings.of(trainer),
        }
        lightning_internals.write_position(checkpoint, epoch, batch)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("between_steps")
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
                "the run is within an epoch, whose batches would be others (between two epochs it "
                "can change)"
            )
        for name, reason in reasons.items():
            if before.get(name) != now.get(name):
                flag = "--seed_everything" if name == "seed" else f"--data.{name}"
                raise UserError(
                    f"{flag} was {before.get(name)} when the run began and is now {now.get(name)}: "
                    f"{reason}.\n"
                    "Leave it out to resume, or start a new run, without the checkpoint."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._restored is not None and self._restored["finished"] == self._limits(trainer):
            # Early stopping has ended the run, and no checkpoint of Lightning's says so.
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
                f"the training loader, a {kind}, has no position: last.ckpt is written at the ends "
                "of epochs only, and a resumed run will not be identical",
                flush=True,
            )
        if self._restored is not None:
            trainer.callback_metrics.update(self._restored["callback_metrics"])
        self.stop_requests.begin(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._between_steps(trainer, lightning_internals.first_batch(trainer))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored is not None:
            lightning_internals.end_restart(trainer, self._restored["batches_that_stepped"])
            self._restored = None
        if batch_idx:
            self._between_steps(trainer, batch_idx)
        device = trainer.strategy.root_device
        seeds.seed_step(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank, device)

    def _between_steps(self, trainer: pl.Trainer, batch_idx: int) -> None:
        step = trainer.global_step
        is_new = step != self._saved_at  # otherwise nothing would be lost
        if is_new and batch_idx % trainer.accumulate_grad_batches:
            return  # no checkpoint holds the gradients of half a step
        is_due = is_new and self._is_save_due(step, batch_idx)
        is_asked = is_due or is_check_due(trainer, batch_idx)
        stops = is_asked and bool(self.stop_requests.pending(trainer))
        if is_due or (stops and is_new and self._can_save_at(batch_idx)):
            self._losses.check(trainer, self.path, self._saved_at)
            self._save(trainer, trainer.current_epoch, batch_idx)
        if stops:
            self._stop(trainer)

    def _is_save_due(self, step: int, batch_idx: int) -> bool:
        every = self.every_n_train_steps
        is_step_due = bool(every) and step % every == 0
        return batch_idx == 0 or (is_step_due and self._can_save_at(batch_idx))

    def _can_save_at(self, batch_idx: int) -> bool:
        return self._is_exact or batch_idx == 0

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._saved_at == trainer.global_step:
            saved = f"everything is saved in {self.path}"
        elif self._saved_at >= 0:
            saved = f"saved until step {self._saved_at:,} in {self.path}"
        else:
            saved = "nothing was saved yet"
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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = lightning_internals.batches_done(trainer)
        if done < trainer.num_training_batches and trainer.global_step != self._saved_at:
            # max_steps has ended the run within an epoch, and a longer run would resume there.
            self._save(trainer, trainer.current_epoch, done, finished=True)

    def at_the_end(self, trainer: pl.Trainer) -> None:
        """Save what all callbacks have left when training has ended."""
        if lightning_internals.batches_done(trainer) >= trainer.num_training_batches:
            self._save(trainer, trainer.current_epoch, 0, finished=True)
        if self.stop_requests.pending(trainer) and not self.stop_requests.is_out_of_time:
            self._stop(trainer)

    def _save(
        self, trainer: pl.Trainer, epoch: int, batch_idx: int, finished: bool = False
    ) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # No event of before a checkpoint may be missing when it is resumed.
                logger.experiment.flush()
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


def _update_model_checkpoint(state: dict[str, Any], dirpath: str | None, step: int) -> None:
    """Adapt the state of a ModelCheckpoint to the folder where the run resumes.

    `dirpath` is None where the checkpoint starts another run. The folder may have moved, and its
    best checkpoint may be of a later step than the one at which the run resumes.
    """
    before = str(state["dirpath"])

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(before):
            return str(dirpath) + value.removeprefix(before)
        return {moved(k): v for k, v in value.items()} if isinstance(value, dict) else value

    if dirpath is not None and Path(before).name != Path(dirpath).name:
        return  # a folder that the user has chosen
    if dirpath is not None:
        state.update({name: moved(value) for name, value in state.items()})
        best = Path(state["best_model_path"])
        if best.is_file() and checkpoints.load(str(best))[1]["global_step"] <= step:
            return
    state.update(dirpath=dirpath, best_model_score=None, best_k_models={}, kth_best_model_path="")
