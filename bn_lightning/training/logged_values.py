"""Values that `self.log` accumulates over an unfinished epoch.

Lightning creates an accumulator when a value is logged for the first time. So the saved
part of an epoch is added after the value has been logged again.
"""

from typing import Any

import lightning.pytorch as pl
import torch

from bn_lightning.training import lightning_internals
from bn_lightning.training.unfinished_epoch import COUNT, States

PREFIX = "logged:"


def of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the accumulators of the current training epoch by name."""
    return {f"{PREFIX}{key}": it for key, it in lightning_internals.accumulators(trainer).items()}


def add(trainer: pl.Trainer, saved: States) -> States:
    """Add the saved values to the accumulators that exist. Return the other saved values."""
    accumulators = of(trainer)
    left: States = {}
    for key, by_rank in saved.items():
        name, _, state = key.rpartition(".")
        if name not in accumulators:
            left[key] = by_rank
        elif state != COUNT:
            _add(trainer, accumulators[name], state, by_rank)
    return left


def _add(trainer: pl.Trainer, accumulator: Any, state: str, by_rank: torch.Tensor) -> None:
    now, meta = getattr(accumulator, state), accumulator.meta
    if meta.is_max_reduction or meta.is_min_reduction:
        reduce = torch.amax if meta.is_max_reduction else torch.amin
        total = reduce(torch.cat([by_rank.to(now), now.view(1)]))
    elif len(by_rank) == trainer.world_size:
        total = by_rank[trainer.global_rank].to(now) + now
    else:
        # The first rank takes over the values of all ranks.
        total = by_rank.sum().to(now) + now if trainer.is_global_zero else now
    setattr(accumulator, state, total)
    accumulator._computed = None
