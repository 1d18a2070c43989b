"""Training batches that are the same in each pass, and leave no trace in the training."""

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from bn_lightning.training import seeds
from bn_lightning.training.batches import ShardedBatches
from bn_lightning.training.data_module import DataModule


def of_training(trainer: pl.Trainer, num_batches: int, augment: bool, seed: int) -> Iterable[Any]:
    """Return training batches of this rank, or all batches of an epoch if it has fewer.

    Args:
        augment: augment the samples as in the first epoch; only with a `DataModule`.
        seed: determines the samples.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, ShardedBatches):
        return first_batches(loader, num_batches, seed)
    order = seeds.statistics_order(len(loader.indices), seed)
    count = min(num_batches * loader.batch_size, len(order))
    rest = count % loader.batch_size
    # Most batch norms fail on one sample per process. Training need not reach this batch.
    if count > rest and rest < 2 * loader.world_size:
        count -= rest
    data = trainer.datamodule  # type: ignore[attr-defined]
    has_augmentation = augment and isinstance(data, DataModule)
    augmentation = data.augmentation(0) if has_augmentation else None
    return loader.fixed(loader.indices[order[:count]], augmentation)


def first_batches(loader: Any, num_batches: int, seed: int) -> Iterator[Any]:
    """Yield the first batches of an epoch, which are the same in each call.

    Seed the global generators before. Generators of the loader and its samplers are
    seeded here, and restored at the end. Other state of a dataset or sampler is not
    restored.
    """
    # The copy starts workers of its own. Persistent ones belong to the training.
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        loader._iterator = None
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    try:
        for generator, _ in states:
            generator.manual_seed(seed)
        yield from islice(loader, num_batches)
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)
    found = [getattr(part, "generator", None) for part in (loader, batch_sampler, *samplers)]
    return list({id(it): it for it in found if isinstance(it, torch.Generator)}.values())
