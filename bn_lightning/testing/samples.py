"""Batches of any structure: the number of their samples, and parts of them."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class Loader:
    """A loader of the given batches. Each pass has new copies, which may be changed."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return map(copy.deepcopy, self.batches)


def count(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first tensor.

    Raises:
        ValueError: the batch contains no tensor.
    """
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: lengths.append(len(tensor)))
    if not lengths:
        raise ValueError("The batch contains no tensor.")
    return lengths[0]


def part(batch: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` to `stop` of a batch.

    Tensors have a row per sample. What is no tensor is left as it is.
    """
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[start:stop].clone())


def unequal_parts(batch: Any) -> list[Any]:
    """Return a batch as four batches of different sizes, of which the last has one sample."""
    size = count(batch)
    ends = sorted({0, size // 2, size // 2 + size // 3, size - 1, size})
    return [part(batch, start, stop) for start, stop in itertools.pairwise(ends)]
