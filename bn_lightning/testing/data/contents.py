"""The record of a batch: a digest of each sample, and the facts that declarations state."""

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_lightning.testing import batches


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
        labels: the targets as numbers; None if they are not one number for each sample.
    """

    samples: list[Sample]
    inputs: list[Kind]
    targets: list[Kind]
    not_finite: list[int]
    labels: list[float] | None


def recorded(batch: Any) -> Batch:
    """Return the record of a batch; see `batches` for its structure."""
    inputs, targets = batches.inputs_and_targets(batch)
    num_samples = batches.count(inputs)
    is_bad = torch.zeros(num_samples, dtype=torch.bool)
    for tensor in [*inputs, *targets]:
        is_bad |= ~tensor.detach().cpu().reshape(num_samples, -1).isfinite().all(1)
    has_labels = len(targets) == 1 and targets[0].dim() == 1
    columns = [digests(tensors, num_samples) for tensors in (inputs, targets)]
    return Batch(
        [Sample(*pair) for pair in zip(*columns, strict=True)],
        [_kind(tensor) for tensor in inputs],
        [_kind(tensor) for tensor in targets],
        is_bad.nonzero().flatten().tolist(),
        targets[0].tolist() if has_labels else None,
    )


def identified(samples: Iterable[Sample], what: str) -> list[Hashable]:
    """Return what identifies each sample: its `content`, its `inputs` or its `targets`."""
    if what == "content":
        return list(samples)
    return [getattr(sample, what) for sample in samples]


def digests(tensors: list[Tensor], num_samples: int) -> list[int]:
    """Return a digest of each sample. Each tensor has a row for each of them."""
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(num_samples)]
    for tensor in tensors:
        # NumPy does not know bfloat16, so bytes are hashed.
        flat = tensor.detach().cpu().reshape(num_samples, -1).contiguous().view(torch.uint8)
        for digest, row in zip(hashes, flat.numpy(), strict=True):
            digest.update(row.tobytes())
    return [int.from_bytes(digest.digest()) for digest in hashes]


def _kind(tensor: Tensor) -> Kind:
    return Kind(tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
