"""Batches from tensors in memory, in an order that any run can resume."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, Tensor], Tensor]  # samples, and their indices in the data set


class ExactLoader(Iterable[Any]):
    """A training loader that can start at any batch of any epoch.

    `ExactResume` resumes a run to the bit only with such a loader. A subclass reads the epoch and
    the first batch when its first batch is requested, and keeps no position of its own.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def size_of(self, batch_idx: int) -> int:
        """Return the number of samples in a batch of the epoch, over all processes."""
        raise NotImplementedError

    # Lightning resumes in the middle of an epoch only with a loader that has these two methods.
    # A position kept here would be lost when Lightning asks for the number of steps before it
    # restores the loader.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Epoch:
    """What one epoch visits.

    Attributes:
        order: indices of samples, int64 (M,).
        first: the batch to start with.
        augment: changes training samples; None leaves them as they are.
    """

    order: Tensor
    first: int = 0
    augment: Augment | None = None


class TensorBatches(ExactLoader):
    """Batches by indexing two tensors in memory.

    With several processes each takes its own shard of every batch; all shards together are the
    batch.

    Args:
        inputs: raw samples (N, ...), on the device where they are wanted.
        targets: (N, ...), on the same device.
        indices: int64 (M,), the samples that take part.
        batch_size: samples of one batch over all processes; the last batch may be smaller.
        epoch: called when the first batch is requested; None visits `indices` in their order.
        rank, world_size: which shard to take, of how many.
        preprocessing: from raw samples to the input of the network.
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
        self.inputs = inputs
        self.targets = targets
        self.indices = indices
        self.batch_size = batch_size
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        self.preprocessing = preprocessing or nn.Identity()

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def size_of(self, batch_idx: int) -> int:
        return min(self.batch_size, len(self.indices) - batch_idx * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning calls iter() more than once before it takes a batch. The body of a generator
        # runs when the first batch is taken.
        epoch = self.epoch() if self.epoch else Epoch(self.indices)
        order = epoch.order.to(self.inputs.device)
        batches = order.split(self.batch_size)  # type: ignore[no-untyped-call]
        for batch in batches[epoch.first :]:
            yield self.take(batch.tensor_split(self.world_size)[self.rank], epoch.augment)

    def take(self, indices: Tensor, augment: Augment | None = None) -> Batch:
        """Return the network's input and the targets of the samples at `indices` (B,)."""
        # index_select takes a quarter of the time of inputs[indices].
        inputs = self.inputs.index_select(0, indices)
        if augment is not None:
            inputs = augment(inputs, indices)
        return self.preprocessing(inputs), self.targets.index_select(0, indices)
