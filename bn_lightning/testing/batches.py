"""Batches of any nested structure: their tensors, the number of samples, and parts of them.

A batch is (inputs, targets, ...), a dict, or the inputs alone.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class FixedBatches:
    """A loader of the given batches. Each pass returns new copies, which may be changed."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return map(copy.deepcopy, self.batches)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, in order."""
    found: list[Tensor] = []
    apply_to_collection(values, Tensor, found.append)
    return found


def inputs_and_targets(batch: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of the inputs, which are the first element or value, and all others."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, list | tuple):
        values = [values]
    return tensors_in(values[0]), tensors_in(values[1:])


def count(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first tensor.

    Raises:
        ValueError: the batch contains no tensor with a row per sample.
    """
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return len(tensor)
    raise ValueError("The batch contains no tensor with a row per sample.")


def part(batch: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` to `stop` of a batch.

    Values other than tensors with a row per sample are left as they are.
    """
    size = count(batch)

    def rows(tensor: Tensor) -> Tensor:
        has_rows = tensor.ndim > 0 and len(tensor) == size
        return tensor[start:stop].clone() if has_rows else tensor

    return apply_to_collection(batch, Tensor, rows)


def unequal_parts(batch: Any) -> list[Any]:
    """Return a batch as four batches of different sizes, of which the last has one sample."""
    size = count(batch)
    ends = sorted({0, size // 2, size // 2 + size // 3, size - 1, size})
    return [part(batch, start, stop) for start, stop in itertools.pairwise(ends)]
