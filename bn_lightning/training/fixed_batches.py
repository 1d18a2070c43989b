"""Training batches that are the same in each pass. Reading them does not change the training."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from bn_lightning.training import lightning_internals, seeds
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
    """Yield the first batches of the first epoch, which are the same in each call.

    Seed the global generators before. The generators of the loader and its samplers are
    seeded here, and restored at the end. Other state of a dataset or sampler is not
    restored.
    """
    # The copy starts workers of its own. Persistent ones belong to the training.
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        loader._iterator = None
    with _seeded(loader, seed):
        yield from islice(loader, num_batches)


@contextmanager
def _seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seed the generators of a loader and its samplers, which are restored at the end.

    A DistributedSampler draws by its epoch, which is set to the first one.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(part, "sampler", None) for part in (loader, batch_sampler)]
    wrapped = map(lightning_internals.wrapped_sampler, samplers)
    with ExitStack() as stack:
        for part in (loader, batch_sampler, *samplers, *wrapped):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                stack.callback(generator.set_state, generator.get_state())
                generator.manual_seed(seed)
            if isinstance(part, DistributedSampler):
                stack.callback(part.set_epoch, part.epoch)
                part.set_epoch(0)
        yield
