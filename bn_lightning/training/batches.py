"""Batches of tensors in memory, in an order that can be resumed at any batch."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.training import lightning_internals

Batch = tuple[Tensor, Tensor]
# (samples, their indices), both on the device of the network -> samples
Augment = Callable[[Tensor, Tensor], Tensor]


class ExactLoader(Iterable[Any]):
    """Base class of training loaders that can start at any batch of any epoch.

    `ExactResume` resumes a run bit for bit only with such a loader. A subclass must not
    store a position. It determines the epoch and the first batch when a batch is first
    requested.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def size_of(self, batch_idx: int) -> int:
        """Return the number of samples in a batch of the epoch, over all ranks."""
        raise NotImplementedError

    # Lightning resumes within an epoch only if the loader has these two methods. A
    # position stored here would be lost: Lightning reads the number of steps before it
    # restores the loader.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Epoch:
    """The samples of one epoch.

    Attributes:
        order: sample indices in the order of training, int64 (M,).
        first: index of the first batch to return.
        augment: augmentation of the samples; None for no augmentation.
        number: the epoch of training, from 0; None in evaluation.
    """

    order: Tensor
    first: int = 0
    augment: Augment | None = None
    number: int | None = None


def training_epoch(
    trainer: pl.Trainer | None,
    order: Callable[[int], Tensor],
    augmentation: Callable[[int], Augment | None],
) -> Epoch:
    """Return the current epoch of training, starting at the first batch to train.

    Args:
        trainer: the trainer of the run; None for epoch 0 from its start.
        order: returns the order of an epoch by its number.
        augmentation: returns the augmentation of an epoch by its number.
    """
    number, first = 0, 0
    if trainer is not None:
        number, first = trainer.current_epoch, lightning_internals.first_batch(trainer)
    return Epoch(order(number), first, augmentation(number), number)


class ShardedBatches(ExactLoader):
    """Base class of loaders of indexed samples, which several ranks share.

    Each rank gets its own shard of every batch. In evaluation, a last batch with fewer
    samples than ranks is joined to the batch before it, so that no shard is empty.

    Args:
        indices: indices of the samples to use, int64 (M,).
        batch_size: samples per batch over all ranks; the last batch may be smaller.
        for_training: whether the loader is for training; otherwise for evaluation.
        rank, world_size: the shard to return, and the number of shards.

    Attributes:
        is_random: whether the current epoch uses the global generators.

    Raises:
        UserError: there are fewer samples for evaluation than ranks.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        for_training: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not for_training:
            # Each rank gets at least one sample of each batch.
            batch_size = max(batch_size, world_size)
            if len(indices) < world_size:
                raise UserError(
                    f"{world_size} processes cannot share {len(indices)} sample(s) for "
                    "evaluation.\nUse fewer processes (--trainer.devices), or more samples."
                )
        self.indices = indices
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.is_random = True
        rest = len(indices) % batch_size
        self._joins_last = not for_training and len(indices) > batch_size and 0 < rest < world_size

    def current_epoch(self) -> Epoch:
        """Return the samples of the current epoch, from the first batch to return."""
        raise NotImplementedError

    def take(self, indices: Tensor) -> Any:
        """Return the batch of the samples at `indices` (B,), without augmentation."""
        raise NotImplementedError

    def fixed(self, indices: Tensor, augment: Augment | None = None) -> Self:
        """Return a loader of the samples at `indices`, in this order in each pass.

        Args:
            indices: int64 (M,).
            augment: augmentation of the samples; None for no augmentation.
        """
        loader = copy.copy(self)
        args = indices, self.batch_size, False, self.rank, self.world_size
        ShardedBatches.__init__(loader, *args)
        epoch = Epoch(indices, augment=augment)
        loader.current_epoch = lambda: epoch  # type: ignore[method-assign]
        return loader

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size) - self._joins_last

    def size_of(self, batch_idx: int) -> int:
        rest = len(self.indices) - batch_idx * self.batch_size
        is_joined = rest < self.batch_size + self.world_size and self._joins_last
        return rest if is_joined else min(self.batch_size, rest)

    def _shards(self, order: Tensor, first: int) -> Iterator[Tensor]:
        """Yield the indices of this rank's samples in each batch of an order, from `first`."""
        batches = order.split(self.batch_size)  # type: ignore[no-untyped-call]
        if self._joins_last:
            batches = (*batches[:-2], torch.cat(batches[-2:]))
        for batch in batches[first:]:
            yield batch.tensor_split(self.world_size)[self.rank]


def network_input(trainer: pl.Trainer, batch: Any) -> Any:
    """Return the input of the network in a batch, on its device and in its precision."""
    batch = trainer.strategy.batch_to_device(batch)
    batch = trainer.precision_plugin.convert_input(batch)
    return batch[0] if isinstance(batch, tuple | list) else batch


class TensorBatches(ShardedBatches):
    """A loader that indexes two tensors in memory.

    Args:
        inputs: raw samples (N, ...), on the device of the network.
        targets: (N, ...), on the same device.
        indices, batch_size, rank, world_size: see `ShardedBatches`.
        epoch: called when a batch is first requested; None for evaluation, in the order
            of `indices`.
        preprocessing: maps raw samples to the input of the network.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        indices: Tensor,
        batch_size: int,
        epoch: Callable[[], Epoch] | None = None,
        rank: int = 0,
        world_size: int = 1,
        preprocessing: nn.Module | None = None,
    ) -> None:
        super().__init__(indices, batch_size, epoch is not None, rank, world_size)
        self.epoch = epoch
        self.inputs = inputs
        self.targets = targets
        self.preprocessing = preprocessing or nn.Identity()

    def current_epoch(self) -> Epoch:
        return self.epoch() if self.epoch else Epoch(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning calls iter() more than once before it requests a batch. As this is a
        # generator, its body runs only when the first batch is requested.
        epoch = self.current_epoch()
        self.is_random = epoch.augment is not None
        for indices in self._shards(epoch.order.to(self.inputs.device), epoch.first):
            yield self._take(indices, epoch.augment)

    def take(self, indices: Tensor) -> Batch:
        return self._take(indices.to(self.inputs.device), None)

    def _take(self, indices: Tensor, augment: Augment | None) -> Batch:
        """Return the network's input and the targets of the samples at `indices` (B,)."""
        # index_select is four times as fast as inputs[indices].
        inputs = self.inputs.index_select(0, indices)
        if augment is not None:
            inputs = augment(inputs, indices)
        return self.preprocessing(inputs), self.targets.index_select(0, indices)
