"""Labelled images in memory: their checks, and the facts that a network must know of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from bn_lightning.errors import UserError

EXPECTED = (
    "It must return (train_images, train_labels, test_images, test_labels, class_names): images "
    "as uint8 (N, H, W) or (N, C, H, W) and integer labels (N,), as tensors or NumPy arrays, and a "
    "sequence of names."
)
# Numbers of channels of pictures. A last dimension of this size is probably the channels.
CHANNELS = (1, 3, 4)
# Pixels that are converted to float64 at a time. They fit into the cache of a CPU.
CHUNK = 65_536


class DataError(UserError):
    """The data are missing, corrupt, or not the expected ones."""


class DataNotFound(DataError):
    """A folder, file or mirror was not found. Another source may have the data."""


@dataclass(frozen=True)
class Facts:
    """What the network and the preprocessing must know of a data set.

    Attributes:
        in_channels: number of channels.
        image_size: height and width in pixels.
        num_classes: number of classes.
        classes: names of the classes; empty if they are not known before the data are
            read.
        mean, std: mean and standard deviation of the training pixels in [0, 1], per
            channel; empty if they are not known before the data are read.
    """

    in_channels: int
    image_size: tuple[int, int]
    num_classes: int
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def shape(self) -> str:
        """The network's view of the data, for messages."""
        height, width = self.image_size
        return (
            f"{height}x{width} pixels, {self.in_channels} channel{'s' * (self.in_channels > 1)}, "
            f"{self.num_classes} classes"
        )


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with labels, in the order of the data set.

    Attributes:
        train_images, test_images: uint8, (N, H, W) for one channel, otherwise (N, C, H,
            W).
        train_labels, test_labels: int64 (N,).
        classes: names of the classes.
        source: where the data are from: a source of Fashion-MNIST, or the name of the
            data set.
        sha256: checksum of the content: a single one, or one for each file.
        folder: the folder that contains the files; None if it is not known.
        num_whole: number of training images in the data set of which these are a sample;
            None if these are all.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    source: str
    sha256: str | dict[str, str]
    folder: Path | None = None
    num_whole: int | None = None

    @property
    def whole(self) -> int:
        """The number of training images in the data set, of which these may be a sample."""
        return self.num_whole or len(self.train_labels)

    def facts(self) -> Facts:
        """Return the facts without mean and standard deviation, which take time to compute."""
        *channels, height, width = self.train_images.shape[1:]
        return Facts(
            channels[0] if channels else 1, (height, width), len(self.classes), self.classes
        )


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels in [0, 1] of each channel.

    Args:
        images: uint8 (N, H, W) or (N, C, H, W).
    """
    pixels = images if images.dim() == 4 else images.unsqueeze(1)
    count = pixels[:, 0].numel()
    parts = torch.split(pixels, max(1, CHUNK // pixels[0, 0].numel()))
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        # The sums of a part are integers below 2**53, so they are exact in float64.
        total = squares = 0
        for part in parts:
            values = part[:, channel].flatten().double()
            total += int(values.sum())
            squares += int(values.dot(values))
        means.append(total / count / 255)
        variance = (count * squares - total**2) / count**2
        # A channel with a single value is not scaled.
        stds.append(variance**0.5 / 255 or 1.0)
    return tuple(means), tuple(stds)


def checked(returned: Any, name: str, folder: Path | None = None) -> LabelledImages:
    """Return what the function of a data set has returned, after checking it.

    Args:
        returned: see `EXPECTED`.
        name: the name of the data set.

    Raises:
        UserError: the values are not as expected.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 5:
        is_series = isinstance(returned, tuple | list)
        _refuse(name, f"{len(returned)} values" if is_series else f"a {_type(returned)}")
    *arrays, names = returned
    classes = _classes(names, name)
    train, test = (
        _checked_part(name, part, images, labels, classes)
        for part, images, labels in zip(("train", "test"), arrays[::2], arrays[1::2], strict=True)
    )
    sizes = [tuple(images.shape[1:]) for images, _ in (train, test)]
    if sizes[0] != sizes[1]:
        _refuse(name, f"train_images of shape {sizes[0]} and test_images of shape {sizes[1]}")
    return LabelledImages(*train, *test, classes, name, _sha256(*train, *test), folder)


def _checked_part(
    name: str, part: str, images: Any, labels: Any, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the checked images and labels of a part, `train` or `test`."""
    pixels = _checked_images(name, f"{part}_images", images)
    if len(pixels) == 0:
        _refuse(name, f"no image in {part}_images")
    what = f"{part}_labels"
    kind = _kind(name, what, labels)
    if "int" not in kind:
        _refuse(name, f"{what} of type {kind}", "Convert the labels to int64.")
    numbers = _tensor(labels, np.int64)
    if numbers.shape != (len(pixels),):
        found = f"{len(pixels):,} {part}_images, but {what} of shape {tuple(numbers.shape)}"
        _refuse(name, found)
    for index in (int(numbers.argmin()), int(numbers.argmax())):
        if not 0 <= numbers[index] < len(classes):
            last = len(classes) - 1
            found = f"label {int(numbers[index])} at index {index} of {what}"
            _refuse(name, found, f"With {len(classes)} class names, labels are from 0 to {last}.")
    return pixels, numbers


def _checked_images(name: str, what: str, images: Any) -> Tensor:
    kind = _kind(name, what, images)
    if "float" in kind:
        advice = "If the pixels are from 0 to 1, multiply by 255, round and convert to uint8."
        _refuse(name, f"{what} of type {kind}", advice)
    if kind != "uint8":
        _refuse(name, f"{what} of type {kind}", "Convert the pixels, from 0 to 255, to uint8.")
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] not in CHANNELS and shape[3] in CHANNELS:
        advice = (
            "The last dimension seems to be the channels. Move it: images.permute(0, 3, 1, 2) of a "
            "tensor, images.transpose(0, 3, 1, 2) of an array."
        )
        _refuse(name, f"{what} of shape {shape}", advice)
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        _refuse(name, f"{what} of shape {shape}")
    pixels = _tensor(images, np.uint8)
    return pixels.squeeze(1) if len(shape) == 4 and shape[1] == 1 else pixels


def _kind(name: str, what: str, value: Any) -> str:
    """Return the name of the dtype, such as `uint8`."""
    if not isinstance(value, Tensor | np.ndarray):
        _refuse(name, f"a {_type(value)} as {what}")
    # NumPy's name does not contain the byte order.
    return getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))


def _tensor(value: Any, dtype: Any) -> Tensor:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    # PyTorch warns of arrays that are not writable.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _classes(names: Any, name: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        _refuse(name, f"a {_type(names)} as class_names")
    classes = list(names)
    for value in classes:
        if not isinstance(value, str):
            _refuse(name, f"the class name {value!r}, a {_type(value)}", "Names must be strings.")
        if classes.count(value) > 1:
            _refuse(name, f"the class name {value!r} more than once", "Names must differ.")
    if len(classes) < 2:
        _refuse(name, f"{len(classes)} class name(s)", "At least two classes are needed.")
    return tuple(map(str, classes))


def _type(value: Any) -> str:
    return type(value).__name__


def _refuse(name: str, found: str, advice: str = "") -> NoReturn:
    advice = f"{advice}\n" if advice else ""
    raise UserError(f"The data set {name!r} returned {found}.\n{advice}{EXPECTED}")


def _sha256(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(str(tuple(tensor.shape)).encode())
        content.update(tensor.numpy().data)
    return content.hexdigest()
