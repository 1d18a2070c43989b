"""The number of optimizer steps of a run."""

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def optimizer_steps(trainer: pl.Trainer) -> float:
    """Return the number of optimizer steps of the whole run, or infinity without a limit.

    Lightning's estimate ignores GradientAccumulationScheduler, and is -1 for a loader
    without length in a run without `max_steps`.
    """
    estimate = trainer.estimated_stepping_batches
    if estimate < 0:
        return math.inf
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedules = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    if not schedules or epochs < 0 or batches == math.inf:
        return estimate
    # The last of several callbacks takes effect.
    factors = [schedules[-1].get_accumulate_grad_batches(epoch) for epoch in range(max(epochs, 1))]
    steps = sum(math.ceil(batches / factor) for factor in factors)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
