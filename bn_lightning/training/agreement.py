"""Comparison of what the ranks of a run start from: data, settings, and the first step.

Each machine finds its own data and its own last.ckpt. If they differed, each rank would
train on shards of other batches, without an error.
"""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from bn_lightning.errors import UserError
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import end_all_ranks


def refuse_ranks_that_differ(trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
    """Refuse a run whose ranks start from different states. All ranks must call this.

    Args:
        step: the step at which this rank starts.

    Raises:
        UserError: the ranks have other data, other settings, or start at other steps.
    """
    ranks: list[dict[str, tuple[Any, Any]]] = [{}] * trainer.world_size
    dist.all_gather_object(ranks, _start_of(trainer, module, step))
    first = ranks[0]
    for rank, own in enumerate(ranks):
        for name in sorted(first.keys() | own.keys()):
            (expected, shown_first), (value, shown) = first.get(name, _NONE), own.get(name, _NONE)
            if value != expected:
                error = UserError(
                    f"The processes of this run differ in {name}: {shown_first} on rank 0, but "
                    f"{shown} on rank {rank}.\n"
                    "Start all processes with the same settings, and give all machines the same "
                    "data and the same checkpoint, for example on a shared file system."
                )
                end_all_ranks(trainer, error)


_NONE = (None, "none")


def _start_of(
    trainer: pl.Trainer, module: pl.LightningModule, step: int
) -> dict[str, tuple[Any, Any]]:
    """Return what must be the same on all ranks by name: a value, and how to show it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    found: dict[str, tuple[Any, Any]] = {"the step at which they start": (step, step)}
    found |= {f"--model.{name}": (value, value) for name, value in module.hparams.items()}
    if isinstance(data, DataModule):
        identity = {name: value for name, value in data.identity().items() if name != "source"}
        found["the data"] = (identity, data.describe())
        may_differ = (*data.machine_settings, *data.source_settings)
        found |= {
            f"--data.{name}": (value, value)
            for name, value in data.hparams.items()
            if name not in may_differ
        }
    return found
