"""What is recorded of a batch: a digest of each sample, and facts that declarations state."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """Digests of the content of a sample. Equal contents have equal digests."""

    inputs: int
    targets: int


class Kind(NamedTuple):
    """The shape of one sample, without the batch dimension, and its dtype."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass
class Batch:
    """The record of a batch.

    Attributes:
        samples: the samples, in order.
        inputs, targets: shape and dtype of each tensor.
        not_finite: positions of the samples with values that are NaN or infinite.
        labels: the targets as numbers, if they are one number for each sample.
    """

    samples: list[Sample]
    inputs: list[Kind] = field(default_factory=list)
    targets: list[Kind] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    labels: list[float] | None = None


def recorded(batch: Any) -> Batch:
    """Return the record of a batch: (inputs, targets, ...), a dict, or a tensor of inputs.

    The first element, or the first value of a dict, is the inputs.
    """
    inputs, targets = _parts(batch)
    digests = [digests_of(values) for values in (inputs, targets)]
    num_samples = max(map(len, digests))
    # A batch without targets has the same digest for each sample.
    columns = [column or [0] * num_samples for column in digests]
    is_bad = torch.zeros(num_samples, dtype=torch.bool)
    for tensor in _tensors([*inputs, *targets]):
        if tensor.is_floating_point():
            is_bad |= ~tensor.detach().cpu().reshape(num_samples, -1).isfinite().all(1)
    is_label = len(targets) == 1 and isinstance(targets[0], Tensor) and targets[0].dim() == 1
    return Batch(
        [Sample(*digest) for digest in zip(*columns, strict=True)],
        [Kind(tuple(t.shape[1:]), _name(t)) for t in _tensors(inputs)],
        [Kind(tuple(t.shape[1:]), _name(t)) for t in _tensors(targets)],
        is_bad.nonzero().flatten().tolist(),
        targets[0].tolist() if is_label else None,
    )


def inputs_of(batch: Any) -> Tensor:
    """Return the first tensor of the inputs of a batch."""
    return _tensors(_parts(batch)[0])[0]


def digests_of(values: Iterable[Any]) -> list[int]:
    """Return a digest for each sample. Each value holds a row for each sample."""
    rows = [_rows(value) for value in values]
    return [
        int.from_bytes(hashlib.blake2b(b"|".join(parts), digest_size=8).digest())
        for parts in zip(*rows, strict=True)
    ]


def _rows(value: Any) -> list[bytes]:
    if not isinstance(value, Tensor):
        return [repr(row).encode() for row in value]
    # NumPy does not know bfloat16, so bytes are hashed.
    flat = value.detach().cpu().reshape(len(value), -1).contiguous()
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()]


def _parts(batch: Any) -> tuple[list[Any], list[Any]]:
    """Return the values of the inputs and of the targets, each with a row for each sample."""
    if isinstance(batch, Mapping):
        first, *others = batch.values()
    elif isinstance(batch, tuple | list):
        first, *others = batch
    else:
        first, others = batch, []
    return _leaves(first), [leaf for other in others for leaf in _leaves(other)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    is_nested = isinstance(value, tuple | list) and any(
        isinstance(part, Tensor | Mapping | tuple | list) for part in value
    )
    return [leaf for part in value for leaf in _leaves(part)] if is_nested else [value]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
