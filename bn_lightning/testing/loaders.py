"""What is known of a loader: which samples it should return, and what they are called."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
)

from bn_lightning.testing.contents import Sample, recorded
from bn_lightning.training import seeds
from bn_lightning.training.batches import ShardedBatches, TensorBatches
from bn_lightning.training.exact_data_loader import ExactDataLoader

CHUNK = 256
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
# How deep a Dataset is searched for random generators.
DEPTH = 4


@dataclass
class Loader:
    """Facts about a loader.

    Attributes:
        kind: the name of its class.
        length: number of batches on this rank; None if it has no length.
        has_workers: whether it can read with worker processes.
        is_exact: whether it is a loader of bn_lightning.
        replaces: whether its sampler may draw a sample more than once.
        drops_last: whether it leaves out an incomplete last batch.
        storage: identifies the tensors or the Dataset that it reads, in this process.
        indices: indices of its samples in the storage; None if they are not known.
        samples: the samples at `indices`, read one after the other; None if it cannot
            be read in this way.
        names: names of the samples at `indices`, such as their files; may be empty.
        generators: random generators that the Dataset keeps, in words.
    """

    kind: str
    length: int | None
    has_workers: bool = False
    is_exact: bool = False
    replaces: bool = False
    drops_last: bool = False
    storage: str = ""
    indices: list[int] | None = None
    samples: list[Sample] | None = None
    names: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loader: Any, reads: bool) -> "Loader":
        """Return the facts about a loader. If it `reads`, `samples` is read too."""
        try:
            found = cls(type(loader).__name__, len(loader))
        except TypeError:
            found = cls(type(loader).__name__, None)
        found.has_workers = isinstance(loader, ExactDataLoader | DataLoader)
        found.is_exact = isinstance(loader, ShardedBatches)
        dataset = _dataset(loader)
        if isinstance(loader, TensorBatches):
            found.storage = _key(loader.inputs)
            found.indices = loader.indices.tolist()
        elif isinstance(loader, ExactDataLoader):
            found._add_indices(dataset, loader.indices.tolist())
        elif isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset):
            sampler = loader.sampler
            found.replaces = bool(getattr(sampler, "replacement", False))
            found.drops_last = bool(getattr(loader.batch_sampler, "drop_last", False))
            own = getattr(sampler, "indices", None)
            own = range(len(dataset)) if own is None else own
            found._add_indices(dataset, [int(index) for index in own])
        if dataset is not None:
            found.generators = sorted(set(generators_in(dataset)))
        if reads and found.indices is not None:
            found.samples = _read(loader)
        return found

    def _add_indices(self, dataset: Any, indices: list[int]) -> None:
        while isinstance(dataset, Still | Subset | StackDataset):
            if isinstance(dataset, Subset):
                indices = [int(dataset.indices[index]) for index in indices]
                dataset = dataset.dataset
            elif isinstance(dataset, Still):
                dataset = dataset.dataset
            else:
                parts: Any = dataset.datasets
                dataset = next(iter(parts.values())) if isinstance(parts, Mapping) else parts[0]
        self.indices, self.storage = indices, _key(dataset)
        path = getattr(dataset, "path", None)
        if callable(path):
            self.names = [str(path(index)) for index in indices]
        files = getattr(dataset, "samples", None)
        if isinstance(files, list) and files and isinstance(files[0], tuple):
            self.names = [str(files[index][0]) for index in indices]

    def name(self, position: int) -> str:
        """Return what a message calls the sample at a position of `indices`."""
        index = position if self.indices is None else self.indices[position]
        return f"{index} ({self.names[position]})" if self.names else str(index)


class Still(Dataset[Any]):
    """A Dataset whose samples are always read with the same state of the global generators."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seeds.seed_read(0)
        return self.dataset[index]


def prepare(loader: Any, workers: int, still: bool) -> Any:
    """Set the number of workers of a loader; with `still`, its Dataset is made `Still`."""
    if isinstance(loader, Mapping):
        for part in loader.values():
            prepare(part, workers, still)
    elif isinstance(loader, list | tuple):
        for part in loader:
            prepare(part, workers, still)
    elif isinstance(loader, ExactDataLoader):
        loader.num_workers = workers
        if still:
            loader.dataset = Still(loader.dataset)
    elif isinstance(loader, DataLoader):
        loader.num_workers = workers
        loader.timeout = loader.timeout if workers else 0
        loader.prefetch_factor = loader.prefetch_factor or 2 if workers else None
    return loader


def generators_in(value: Any, depth: int = DEPTH, path: str = "") -> list[str]:
    """Return the random generators that an object, its attributes or its module keep, in words."""
    if isinstance(value, GENERATORS):
        kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
        return [f"`{path}`, a {kind}"]
    if isinstance(value, list | tuple) and len(value) <= 20:
        return [f for part in value for f in generators_in(part, depth - 1, path)]
    if (
        depth == 0
        or isinstance(value, Tensor | np.ndarray | type)
        or not hasattr(value, "__dict__")
    ):
        return []
    owner = type(value)
    found = []
    module = sys.modules.get(owner.__module__)
    is_library = owner.__module__.partition(".")[0] in ("torch", "torchvision", "bn_lightning")
    if module is not None and not is_library and callable(getattr(value, "__getitem__", None)):
        found += [
            f"`{name}` of {owner.__module__}, a {type(kept).__module__.partition('.')[0]} generator"
            for name, kept in vars(module).items()
            if isinstance(kept, GENERATORS)
        ]
    for name, kept in vars(value).items():
        found += generators_in(kept, depth - 1, f"{owner.__name__}.{name}")
    return found


def _dataset(loader: Any) -> Any:
    return loader.dataset if isinstance(loader, ExactDataLoader | DataLoader) else None


def _key(storage: Any) -> str:
    if isinstance(storage, TensorDataset):
        storage = storage.tensors[0]
    if isinstance(storage, Tensor):
        return f"tensor {storage.data_ptr()} {tuple(storage.shape)}"
    return f"{type(storage).__name__} {id(storage)}"


def _read(loader: Any) -> list[Sample] | None:
    """Return the samples of a loader, one after the other, without its order and its ranks."""
    if isinstance(loader, ShardedBatches):
        chunks = loader.indices.split(CHUNK)  # type: ignore[no-untyped-call]
        return [sample for chunk in chunks for sample in recorded(loader.take(chunk)).samples]
    if loader.batch_sampler is None:
        return None
    own = getattr(loader.sampler, "indices", None)
    order = range(len(loader.dataset)) if own is None else [int(index) for index in own]
    samples: list[Sample] = []
    for first in range(0, len(order), CHUNK):
        rows = [loader.dataset[index] for index in order[first : first + CHUNK]]
        samples += recorded(loader.collate_fn(rows)).samples
    return samples
