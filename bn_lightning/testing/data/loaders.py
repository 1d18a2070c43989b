"""What is known of a loader: which samples it should return, and what they are called."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
)

from bn_lightning.testing.data.changes import Still
from bn_lightning.testing.data.contents import Sample, identified, recorded
from bn_lightning.testing.own_generators import generators_in
from bn_lightning.training.batches import ShardedBatches, TensorBatches
from bn_lightning.training.exact_data_loader import ExactDataLoader

CHUNK = 256


@dataclass
class Loader:
    """Facts about a loader.

    Attributes:
        has_workers: whether it can read with worker processes.
        is_exact: whether it is a loader of bn_lightning.
        replaces: whether its sampler may draw a sample more than once.
        drops_last: whether it leaves out an incomplete last batch.
        storage: identifies the tensors or the Dataset that it reads, in this process.
        indices: indices of its samples in the storage; empty if they are not known.
        samples: the samples at `indices`, read one after the other; empty if it cannot
            be read in this way.
        names: names of the samples at `indices`, such as their files; may be empty.
        generators: random generators that the Dataset keeps, in words.
    """

    has_workers: bool
    is_exact: bool
    replaces: bool = False
    drops_last: bool = False
    storage: str = ""
    indices: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, loader: Any, reads: bool) -> "Loader":
        """Return the facts about a loader. If it `reads`, `samples` is read too."""
        has_dataset = isinstance(loader, ExactDataLoader | DataLoader)
        is_exact = isinstance(loader, ShardedBatches)
        found = cls(has_dataset, is_exact)
        if isinstance(loader, TensorBatches):
            found.storage = _key(loader.inputs)
            found.indices = loader.indices.tolist()
        elif isinstance(loader, ExactDataLoader):
            found._add_indices(loader.dataset, loader.indices.tolist())
        elif isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            found.replaces = bool(getattr(loader.sampler, "replacement", False))
            found.drops_last = bool(getattr(loader.batch_sampler, "drop_last", False))
            found._add_indices(loader.dataset, _positions(loader))
        if has_dataset:
            found.generators = sorted(set(generators_in(loader.dataset)))
        if reads and found.indices:
            found.samples = _read(loader)
        return found

    def _add_indices(self, dataset: Any, indices: list[int]) -> None:
        """Add the indices in the innermost Dataset, and the names of their files."""
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
        # This is the attribute of torchvision's ImageFolder.
        files = getattr(dataset, "samples", None)
        if isinstance(files, list) and files and isinstance(files[0], tuple):
            self.names = [str(files[index][0]) for index in indices]

    def name(self, position: int) -> str:
        """Return what a message calls the sample at a position of `indices`."""
        index = self.indices[position] if self.indices else position
        return f"{index} ({self.names[position]})" if self.names else str(index)

    def names_of(self, values: Iterable[Hashable], what: str) -> list[str]:
        """Return the names of all samples whose `content`, `inputs` or `targets` are given."""
        wanted, found = set(values), identified(self.samples, what)
        return [self.name(position) for position, value in enumerate(found) if value in wanted]


def _key(storage: Any) -> str:
    if isinstance(storage, TensorDataset):
        storage = storage.tensors[0]
    if isinstance(storage, Tensor):
        return f"tensor {storage.data_ptr()} {tuple(storage.shape)}"
    return f"{type(storage).__name__} {id(storage)}"


def _positions(loader: DataLoader[Any]) -> list[int]:
    """Return the positions in its Dataset that a DataLoader reads, without its order."""
    own = getattr(loader.sampler, "indices", None)
    dataset: Any = loader.dataset
    return list(range(len(dataset))) if own is None else [int(index) for index in own]


def _read(loader: Any) -> list[Sample]:
    """Return the samples of a loader, one after the other, without its order and its ranks."""
    samples: list[Sample] = []
    if isinstance(loader, ShardedBatches):
        for chunk in loader.indices.split(CHUNK):  # type: ignore[no-untyped-call]
            samples += recorded(loader.take(chunk)).samples
    elif loader.batch_sampler is not None:
        positions = _positions(loader)
        for first in range(0, len(positions), CHUNK):
            rows = [loader.dataset[index] for index in positions[first : first + CHUNK]]
            samples += recorded(loader.collate_fn(rows)).samples
    return samples
