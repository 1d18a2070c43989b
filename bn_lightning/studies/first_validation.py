"""Whether a run is long enough for its first validation, which is known before it starts."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from bn_lightning.errors import UserError
from bn_lightning.training.data_module import DataModule


def refuse_runs_without_validation(trainer: pl.Trainer, data: DataModule) -> None:
    """Refuse a run that ends before its first validation.

    Args:
        trainer: the trainer of the run.
        data: its data module, after `prepare_data`.

    Raises:
        UserError: --trainer.max_steps or --trainer.max_epochs is too small.
    """
    every = trainer.check_val_every_n_epoch
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    if every is not None and 0 <= epochs < every:
        raise UserError(
            f"No run would be validated: --trainer.max_epochs is {epochs}, and "
            f"--trainer.check_val_every_n_epoch is {every}.\n"
            f"Use --trainer.max_epochs {every} or more."
        )
    if trainer.max_steps < 0:
        return
    steps = _steps_to_first_validation(trainer, data)
    if trainer.max_steps < steps:
        raise UserError(
            f"No run would be validated: --trainer.max_steps is {trainer.max_steps}, and the first "
            f"validation is after step {steps}.\n"
            f"Use --trainer.max_steps {steps} or more, or validate earlier with "
            "--trainer.val_check_interval."
        )


def _steps_to_first_validation(trainer: pl.Trainer, data: DataModule) -> int:
    """Return the optimizer steps before the first validation, or 0 if they are unknown."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        return 0
    data.setup("fit")
    try:
        batches = len(data.train_dataloader())
    except TypeError:
        # A loader of an iterable data set has no length.
        return 0
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    interval = trainer.val_check_interval
    if not isinstance(interval, int | float):
        # An interval of time.
        return 0
    at = interval if isinstance(interval, int) else max(1, int(batches * interval))
    if trainer.check_val_every_n_epoch is None:
        epochs, at = divmod(at, batches)
    else:
        epochs = trainer.check_val_every_n_epoch - 1
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    # The last step of an epoch may accumulate fewer batches.
    rest = steps_per_epoch if at == batches else at // trainer.accumulate_grad_batches
    return epochs * steps_per_epoch + rest
