"""The files of a part of a folder of pictures: selection, checks and checksum."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from bn_lightning.data.labelled_images import DataError
from bn_lightning.terminal import enumerated

MAX_NAMED = 8  # classes in a message


@dataclass(frozen=True)
class Part:
    """The pictures of a part, such as the training pictures.

    They are in arrays because worker processes share the memory of arrays. Lists of
    strings would be copied when they are read.

    Attributes:
        names: paths relative to the folder, with `/`, as bytes (N,), sorted.
        sizes: sizes of the files in bytes, int64 (N,).
        times: times of their last change in nanoseconds, int64 (N,).
        labels: indices of the classes, int64 (N,).
    """

    names: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: np.ndarray) -> Self:
        """Return the pictures at indices, or where a mask is true."""
        labels = self.labels[torch.from_numpy(index)]
        return type(self)(self.names[index], self.sizes[index], self.times[index], labels)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the pictures of all parts, one part after the other."""
        return cls(
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.times for part in parts]),
            torch.cat([part.labels for part in parts]),
        )


def refuse_empty_classes(path: Path, classes: Sequence[str], train: Part) -> None:
    """Raise DataError if a class has no training pictures left.

    Args:
        path: the folder, for the message.
    """
    counts = train.labels.bincount(minlength=len(classes))
    empty = [repr(name) for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if empty:
        raise DataError(
            f"Classes of {str(path)!r} without a training picture: "
            f"{enumerated(empty, MAX_NAMED)}.\n"
            "They have too few pictures that can be read, or all are test pictures. Add pictures, "
            "or remove the folders of these classes."
        )


def checksum(classes: Sequence[str], parts: Sequence[Part]) -> str:
    """Return the sha256 of the class names, and of the names, sizes and labels of the files.

    It does not depend on the location of the folder, or on the times of the files.
    """
    content = hashlib.sha256(json.dumps(list(classes)).encode())
    for part in parts:
        content.update(f"\0{len(part)}\0".encode())
        for name in part.names:
            # The array pads names with zeros, and its width depends on the longest name.
            content.update(bytes(name) + b"\0")
        for numbers in (part.sizes, part.labels.numpy()):
            content.update(numbers.astype("<i8").tobytes())
    return content.hexdigest()
