"""Refusal of batches that are too small to train on, before the first step.

Most batch norms fail on a single value per channel: after a linear layer, that is a
single sample. A run would otherwise fail in the last batch of its first epoch.
"""

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from bn_lightning.errors import UserError, describe_error
from bn_lightning.training import lightning_internals
from bn_lightning.training.batches import ShardedBatches, network_input
from bn_lightning.training.stopping import end_all_ranks


def refuse_small_batches(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse to train if a batch has too few samples. All ranks must call this.

    A batch must have a sample for each rank. If a rank would get a single sample, a
    forward pass is tried.

    Raises:
        UserError: a batch that will be trained is too small.
    """
    loader, num_ranks = trainer.train_dataloader, trainer.world_size
    if not isinstance(loader, ShardedBatches):
        return
    for batch_idx in _first_and_last(trainer):
        size = loader.size_of(batch_idx)
        if size // num_ranks > 1:
            continue
        why = f"{num_ranks} processes share each batch" if num_ranks > 1 else ""
        if size >= num_ranks:
            fault = _fault(trainer, module, loader, size)
            if not fault:
                continue
            why = f"the network cannot be trained on one sample per process ({fault})"
        which = "The last batch of an epoch" if batch_idx else "A batch"
        count = f"{len(loader.indices):,} training samples in batches of {loader.batch_size}"
        error = UserError(
            f"{which} has {size} sample(s), but {why}: {count}.\n"
            f"Choose another batch size{_example(loader)}."
        )
        end_all_ranks(trainer, error)


def _first_and_last(trainer: pl.Trainer) -> set[int]:
    """Return the indices of the first batch and, if it will be trained, of the last batch."""
    last = int(trainer.num_training_batches) - 1
    if trainer.max_steps != -1:
        num_left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        if lightning_internals.first_batch(trainer) + num_left <= last:
            return {0}
    return {0, last}


def _fault(
    trainer: pl.Trainer, module: pl.LightningModule, loader: ShardedBatches, size: int
) -> str:
    """Try a batch of this size on all ranks. Return the error of any rank, or an empty string."""
    fault = _error_of_forward(trainer, module, loader, size)
    # If a larger batch fails too, the cause is another one.
    larger_fault = _error_of_forward(trainer, module, loader, 2 * trainer.world_size)
    faults = [fault if not larger_fault else ""]
    if trainer.world_size > 1:
        faults = [""] * trainer.world_size
        dist.all_gather_object(faults, fault if not larger_fault else "")
    return next(filter(None, faults), "")


def _error_of_forward(
    trainer: pl.Trainer, module: pl.LightningModule, loader: ShardedBatches, size: int
) -> str:
    """Return the error of a forward pass in training mode, which leaves no trace."""
    samples = loader.indices[torch.arange(size) % len(loader.indices)]
    shard = samples.tensor_split(loader.world_size)[loader.rank]
    inputs = network_input(trainer, loader.take(shard))
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    device = trainer.strategy.root_device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), trainer.precision_plugin.train_step_context():
            module(inputs)
    except Exception as error:
        return describe_error(error)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    return ""


def _example(loader: ShardedBatches) -> str:
    """Return a batch size that leaves each rank at least two samples of every batch."""
    num_samples = len(loader.indices)
    for size in range(loader.batch_size + 1, num_samples + 1):
        if (num_samples % size or size) // loader.world_size > 1:
            return f", for example --data.batch_size {size}"
    return ""
