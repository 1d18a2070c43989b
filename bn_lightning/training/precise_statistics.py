"""The callback that validates and saves a network with precise running statistics."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bn_lightning.errors import UserError
from bn_lightning.norms import estimation, modes
from bn_lightning.training import fixed_batches, lightning_internals, seeds
from bn_lightning.training.batches import ShardedBatches, network_input
from bn_lightning.training.checkpoints import PRECISE_STATISTICS
from bn_lightning.training.resume import FinalSave

Statistics = dict[str, Tensor]


class PreciseStatistics(pl.Callback):
    """Estimates the running statistics anew before each validation and at the end.

    Use it as `Trainer(callbacks=[PreciseStatistics(num_batches=20)])`. See
    `estimate_statistics`. Training is unchanged: after each validation, the network has
    its running statistics back. After `fit`, it has the estimated ones.

    These checkpoints have the estimated statistics:

    * `best.ckpt`, and every checkpoint that is saved at the end of a validation, or at
      the end of an epoch that ends with a validation;
    * `last.ckpt` of a run that has ended. They have a key of their own, which evaluation
      uses. The `state_dict` has the running statistics, which training needs.

    All other checkpoints have the running statistics of training.

    The batches are the same throughout a run. The seed selects the samples, which are
    not augmented. If the training loader is not a `ShardedBatches`, for example a plain
    DataLoader, the batches are the first ones of an epoch, and are augmented as the
    loader does. Such a loader must draw its random numbers from the global generators or
    from a torch.Generator in the attribute `generator` of the loader or a sampler.

    With weight averaging, the statistics are those of the averaged weights.
    `bn_lightning.StochasticWeightAveraging` then makes no pass of its own.

    Args:
        num_batches: the number of training batches, with the batch size of training.
        augment: augment the samples as in the first epoch; only with a `DataModule`.
        seed: determines the batches.

    Attributes:
        running, estimated: the running statistics of training and the estimated ones at
            the last validation, by their names in the state dict.
        is_validating: whether the network has the estimated statistics for a validation.

    Raises:
        UserError: num_batches is below 1; in `fit`, if the module has no `forward`,
            if there are several training loaders, or if a ModelCheckpoint saves only weights at
            the end of an epoch, after the statistics of training are back.
    """

    def __init__(self, num_batches: int = 20, augment: bool = False, seed: int = 0) -> None:
        if num_batches < 1:
            raise UserError(
                f"num_batches is {num_batches}; it must be at least 1, for example "
                "PreciseStatistics(num_batches=20)."
            )
        self.num_batches = num_batches
        self.augment = augment
        self.seed = seed
        self._reset()

    def _reset(self) -> None:
        self.running: Statistics = {}
        self.estimated: Statistics = {}
        self.is_validating = False
        self._estimated_at: tuple[int, int, int] | None = None  # see _position
        self._final: Statistics | None = None  # at the end of training
        self._count, self._seconds = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()
            # Weight averaging puts the average in place before the estimate, and
            # ModelCheckpoint saves after a validation before the statistics of training
            # are back. Lightning iterates over the list, so it is replaced.
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            final = [callback for callback in callbacks if isinstance(callback, FinalSave)]
            others = [callback for callback in callbacks if callback not in (self, *final)]
            trainer.callbacks = [*others, self, *final]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_overridden("forward", pl_module):
            raise UserError(
                f"PreciseStatistics calls the module with the input of a batch, but "
                f"{type(pl_module).__name__} has no forward().\n"
                "Add the method forward(self, inputs), which calls the network."
            )
        loader = trainer.train_dataloader
        if isinstance(loader, Mapping | list | tuple):
            raise UserError(
                "PreciseStatistics needs a single training loader, but train_dataloader() returns "
                f"{len(loader)} in a {type(loader).__name__}.\n"
                "Remove the callback, or return one loader."
            )
        if lightning_internals.saves_weights_after_epochs(trainer):
            raise UserError(
                "ModelCheckpoint(save_weights_only=True) saves at the end of an epoch, when the "
                "network has the running statistics of training again.\n"
                "Add save_on_train_epoch_end=False. It then saves at the end of a validation, with "
                "the precise statistics."
            )
        number = self.num_batches
        if isinstance(loader, ShardedBatches):
            number = min(number, len(loader))
        pl_module.print(
            f"precise statistics, before each validation and at the end, from {number} training "
            f"batches: {estimation.plan(pl_module)}"
        )

    # During a validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_validation_of_fit(trainer):
            return
        # The average may have a higher precision than the network, with which it is
        # swapped later.
        source = _averaged(trainer, pl_module)
        with modes.restored(pl_module):
            lightning_internals.restore_training_modes(trainer)
            names = estimation.statistics(pl_module)
        self.running = {name: source.get_buffer(name).clone() for name in names}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_validation_of_fit(trainer):
            return
        # Now the network has the averaged weights.
        with modes.restored(pl_module):
            lightning_internals.restore_training_modes(trainer)
            self.estimated = self._estimate(trainer, pl_module)
        _write(self.estimated, pl_module)
        self._estimated_at = _position(trainer)
        self.is_validating = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_validating:
            # The averaged weights are back in the average, with their estimated statistics.
            _write(self.running, _averaged(trainer, pl_module))
        self.is_validating = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # With weight averaging, the exception may have left the averaged weights in the
        # network. Then it keeps their statistics.
        if self.is_validating and _averaging(trainer) is None:
            _write(self.running, pl_module)
        self.is_validating = False

    # Checkpoints

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        between_steps = checkpoint.get("between_steps")  # in last.ckpt only
        if between_steps is not None:
            if between_steps["is_tested"]:
                checkpoint[PRECISE_STATISTICS] = self._at_end(trainer, pl_module)
        elif self._estimated_at == _position(trainer):
            # Weight averaging may have entered the same dict under two keys.
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **self.estimated}

    def _at_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        """Return the statistics for the weights that a run saves when it ends."""
        if self._final is not None:
            return self._final
        # The run has ended within an epoch, and the network has no averaged weights yet.
        averaging = _averaging(trainer)
        if averaging is None:
            return self._estimate(trainer, pl_module)
        with lightning_internals.average_in_place(averaging, pl_module):
            return self._estimate(trainer, pl_module)

    # At the end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Other callbacks may have changed the weights.
        self._final = self._estimate(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._final:
            # With weight averaging, a checkpoint saved from now on has the average.
            for module in (pl_module, _averaged(trainer, pl_module)):
                _write(self._final, module)
        if self._count:
            pl_module.print(
                f"precise statistics: estimated {self._count} time(s), in {self._seconds:.1f} s "
                "in total"
            )

    # The estimate

    def _estimate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Statistics:
        """Return the statistics for the current weights. The network keeps its own."""
        before = _copied(estimation.statistics(pl_module))
        if not before:
            return {}
        start = time.perf_counter()
        with trainer.precision_plugin.val_step_context(), _stage_of(trainer, self.augment):
            estimation.estimate_statistics(pl_module, self._inputs(trainer))
        found = _copied(estimation.statistics(pl_module))
        _write(before, pl_module)
        device = trainer.strategy.root_device
        torch.get_device_module(device).synchronize()
        self._count += 1
        self._seconds += time.perf_counter() - start
        return found

    def _inputs(self, trainer: pl.Trainer) -> Iterator[Any]:
        # `estimate_statistics` restores the global generators.
        device, rank = trainer.strategy.root_device, trainer.global_rank
        seeds.seed_fetch(self.seed, 0, 0, rank, device)
        for batch in fixed_batches.of_training(trainer, self.num_batches, self.augment, self.seed):
            yield network_input(trainer, batch)


def _is_validation_of_fit(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def is_used(trainer: pl.Trainer) -> bool:
    """Return whether a trainer has the callback `PreciseStatistics`."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, PreciseStatistics) for callback in callbacks)


@contextmanager
def _stage_of(trainer: pl.Trainer, training: bool) -> Iterator[None]:
    """Set the stage. The hooks of a user may read it, for example to augment whole batches."""
    before = trainer.state.stage
    trainer.state.stage = RunningStage.TRAINING if training else RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = before


def _averaging(trainer: pl.Trainer) -> WeightAveraging | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, WeightAveraging)), None)


def _position(trainer: pl.Trainer) -> tuple[int, int, int]:
    """Return a position in training, at which the weights and their average do not change.

    It consists of the epoch, the number of optimizer steps, and the number of updates of
    the average.
    """
    average = _average(trainer)
    updates = 0 if average is None else int(average.n_averaged)
    return trainer.current_epoch, trainer.global_step, updates


def _average(trainer: pl.Trainer) -> AveragedModel | None:
    averaging = _averaging(trainer)
    return None if averaging is None else lightning_internals.average_model(averaging)


def _averaged(trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.nn.Module:
    """Return the average of the network, or the network itself if there is none."""
    average = _average(trainer)
    return pl_module if average is None else average.module


def _copied(statistics: Statistics) -> Statistics:
    return {name: value.clone() for name, value in statistics.items()}


def _write(statistics: Statistics, module: torch.nn.Module) -> None:
    for name, value in statistics.items():
        module.get_buffer(name).copy_(value)
