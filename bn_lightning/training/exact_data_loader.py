"""A loader for any map-style Dataset, read by worker processes, with exact resume."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from bn_lightning import generators
from bn_lightning.errors import UserError, describe_error
from bn_lightning.training import seeds
from bn_lightning.training.batches import Augment, Epoch, ShardedBatches, training_epoch
from bn_lightning.training.worker_processes import (
    ADVICE,
    SHARED_MEMORY_IS_FULL,
    START_METHOD,
    WorkerFailed,
    ending_with,
    init_worker,
)


class ExactDataLoader(ShardedBatches):
    """Batches of a map-style Dataset, read by the worker processes of PyTorch's DataLoader.

    A run that is stopped at any batch continues with the same batches, also with another
    number of workers or ranks. While a sample is read, the global generators of torch,
    NumPy and Python are seeded by (seed, epoch, sample), so its random transforms do not
    depend on the worker, the rank or the samples before. In evaluation, the samples are
    in order and have the same random numbers in each pass.

        def train_dataloader(self):
            return ExactDataLoader(
                self.train_set, self.batch_size, shuffle=True, num_workers=2, trainer=self.trainer
            )

    The workers are started for each epoch, and end before its last batch is returned.
    They ignore the signals that stop a run, and end with their parent. On Linux, they are
    forked.

    Args:
        dataset: `dataset[i]` returns sample i, for example a tuple (input, target). Its
            random numbers must be those of the global generators.
        batch_size: samples per batch over all ranks; the last batch may be smaller.
        shuffle: whether the samples have a new order in each epoch of training.
        num_workers: number of worker processes on each rank; with 0, the process itself
            reads.
        collate_fn: converts a list of samples into a batch.
        indices: indices of the samples to use, int64 (M,); by default all.
        seed: seed of the order and of the samples' random numbers.
        trainer: the trainer of the run, which knows the epoch, the position and the rank.
            Without it, each pass is that of epoch 0 on a single rank.
        augmentation: returns the augmentation of a training epoch by its number, or
            None. It is applied by the workers to the first element of each batch.
        preprocessing: applied to the first element of each batch, on the device of the
            network.

    Raises:
        UserError: the dataset is not map-style, or there are fewer than 0 workers.
        WorkerFailed: a sample cannot be read, because the dataset raised UserError or
            OSError, or a worker process has ended.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        indices: Tensor | None = None,
        seed: int = 0,
        trainer: pl.Trainer | None = None,
        augmentation: Callable[[int], Augment | None] | None = None,
        preprocessing: nn.Module | None = None,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UserError(
                f"ExactDataLoader cannot read {type(dataset).__name__}, because its samples "
                "cannot be indexed.\nUse a map-style Dataset, with __len__ and __getitem__, or "
                "PyTorch's DataLoader, with which a run is resumed only between epochs."
            )
        if num_workers < 0:
            raise UserError(f"num_workers is {num_workers}; it must be 0 or more.")
        if indices is None:
            indices = torch.arange(len(dataset))
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        super().__init__(indices, batch_size, shuffle, rank, world_size)
        self.dataset = dataset
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.seed = seed
        self.trainer = trainer
        self.augmentation = augmentation
        self.preprocessing = preprocessing
        self.device = trainer.strategy.root_device if trainer else torch.device("cpu")
        # Reading leaves the global generators of this process as they are.
        self.is_random = False

    def current_epoch(self) -> Epoch:
        trainer = self.trainer
        if not (self.shuffle if trainer is None else trainer.training):
            return Epoch(self.indices)
        return training_epoch(trainer, self._order, self.augmentation or (lambda epoch: None))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return self.indices
        return seeds.shuffled(self.indices, self.seed, epoch, self.trainer)

    def __iter__(self) -> Iterator[Any]:
        # This is a generator for the same reason as in TensorBatches.
        epoch = self.current_epoch()
        reader = _Reader(self.dataset, self.collate_fn, epoch.augment)
        requests = self._requests(self._shards(epoch.order, epoch.first), epoch.number)
        num_batches = len(self) - epoch.first
        if self.num_workers > 0 and num_batches > 0:
            batches = self._read_by_workers(reader, requests, num_batches)
        else:
            batches = map(reader.read_here, requests)
        for batch in batches:
            yield self._preprocessed(batch)

    def take(self, indices: Tensor) -> Any:
        reader = _Reader(self.dataset, self.collate_fn)
        return self._preprocessed(reader.read_here(next(self._requests(iter([indices])))))

    def _requests(
        self, batches: Iterator[Tensor], epoch: int | None = None
    ) -> Iterator["_Request"]:
        numbers = seeds.of_reads(len(self.dataset), self.seed, epoch)
        for indices in batches:
            yield indices.tolist(), numbers[indices].tolist()

    def _read_by_workers(
        self, reader: "_Reader", requests: Iterator["_Request"], num_batches: int
    ) -> Iterator[Any]:
        with warnings.catch_warnings():
            # The number of workers is the user's choice, even if there are fewer cores.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            loader = DataLoader(
                reader,
                # A request is a whole batch.
                batch_size=None,
                sampler=requests,
                collate_fn=_unchanged,
                num_workers=min(self.num_workers, num_batches),
                worker_init_fn=init_worker,
                multiprocessing_context=START_METHOD,
                pin_memory=self.device.type == "cuda",
                # PyTorch would otherwise take a number from the global generator.
                generator=torch.Generator(),
            )
            started = iter(loader)
        with ending_with(started) as batches:
            yield from islice(batches, num_batches - 1)
            last = next(batches)
        # Lightning does not ask for a batch after the last one. The workers would last until
        # the next epoch, and need memory during the validation.
        yield last

    def _preprocessed(self, batch: Any) -> Any:
        if isinstance(batch, _Failure):
            raise WorkerFailed(batch.reason)
        if self.preprocessing is None:
            return batch
        inputs, *others = batch
        return self.preprocessing(inputs.to(self.device, non_blocking=True)), *others


# Indices of the samples of a batch, and the seed of each.
_Request = tuple[list[int], list[int]]


@dataclass(frozen=True)
class _Failure:
    """The reason why a batch could not be read. A worker returns it instead of the batch.

    The traceback that PyTorch adds to an exception would be a part of the message.
    """

    reason: str


@dataclass(frozen=True)
class _Reader(Dataset[Any]):
    """Reads whole batches, in a worker or in the process itself."""

    dataset: Dataset[Any]
    collate_fn: Callable[[list[Any]], Any]
    augment: Augment | None = None

    def __getitem__(self, request: _Request) -> Any:
        indices, numbers = request
        samples = []
        try:
            for index, number in zip(indices, numbers, strict=True):
                seeds.seed_read(number)
                samples.append(self.dataset[index])
        except UserError as error:
            return _Failure(str(error))
        except OSError as error:
            return _Failure(f"Sample {index} cannot be read: {describe_error(error)}")
        try:
            batch = self.collate_fn(samples)
            if self.augment is not None:
                inputs, *others = batch
                batch = self.augment(inputs, torch.tensor(indices)), *others
            if get_worker_info() is None:
                return batch
            # PyTorch would do this in a thread, and lose the batch if it fails.
            return apply_to_collection(batch, Tensor, Tensor.share_memory_)
        except RuntimeError as error:
            if "shm" not in str(error):
                raise
            return _Failure(f"{SHARED_MEMORY_IS_FULL}\n{ADVICE}")

    def read_here(self, request: _Request) -> Any:
        """Read a batch in this process, and leave its random generators unchanged."""
        with generators.unchanged():
            return self[request]


def _unchanged(batch: Any) -> Any:
    return batch
