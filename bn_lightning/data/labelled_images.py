"""Labelled images in memory: their checks, and the facts that a network must know of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from bn_lightning.data.image_sets import ImageSet
from bn_lightning.errors import UserError
from bn_lightning.terminal import enumerated

Images = Tensor | ImageSet
PerChannel = tuple[float, ...]

EXPECTED = (
    "It must return (train_images, train_labels, test_images, test_labels, class_names): images "
    "as uint8 (N, H, W) or (N, C, H, W) and integer labels (N,), as tensors or NumPy arrays, and a "
    "sequence of names. Or (train_dataset, test_dataset, class_names): map-style Datasets of "
    "(image, label)."
)
# Numbers of channels of pictures. A last dimension of this size is probably the channels.
CHANNELS = (1, 3, 4)
# Pixels that are converted to float64 at a time. They fit into the cache of a CPU.
CHUNK = 65_536
MAX_NAMED = 10  # classes in a message


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

    def refuse_other(self, found: "Facts", name: str) -> None:
        """Refuse images for which the network was not trained.

        Args:
            found: the facts of the images.
            name: name of the data set.

        Raises:
            UserError: size, channels or classes differ.
        """
        if self.shape != found.shape:
            raise UserError(
                f"The images of the data set {name!r} have {found.shape}, but the network is for "
                f"{self.shape}.\nUse the data with which the network was trained."
            )
        if self.classes and tuple(self.classes) != found.classes:
            raise UserError(
                f"The data set {name!r} has the classes {enumerated(found.classes, MAX_NAMED)}, "
                f"but the network is for {enumerated(self.classes, MAX_NAMED)}.\n"
                "Use data with the same classes."
            )


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images with labels, in the order of the data set.

    Attributes:
        train_images, test_images: in memory, uint8, (N, H, W) for one channel,
            otherwise (N, C, H, W); or an `ImageSet`.
        train_labels, test_labels: int64 (N,).
        classes: names of the classes.
        source: where the data are from: a source of Fashion-MNIST, or the name of the
            data set.
        sha256: checksum of the content: a single one, or one for each file.
        folder: the folder that contains the files; None if it is not known.
        num_whole: number of training images in the data set of which these are a sample;
            None if these are all.
        val: images and labels for validation; None if they are split off the training
            images.
        splits_test: whether the test images are split off the same files as the training
            images.
        mean, std: see `Facts`; empty if they are not known yet.
        notes: what was split off or left out, for the console.
        test_names: names of the test images, such as their files; empty for their
            indices.
    """

    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    classes: tuple[str, ...]
    source: str
    sha256: str | dict[str, str]
    folder: Path | None = None
    num_whole: int | None = None
    val: tuple[Images, Tensor] | None = None
    splits_test: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()

    @property
    def whole(self) -> int:
        """The number of training images in the data set, of which these may be a sample."""
        return self.num_whole or len(self.train_labels)

    def facts(self) -> Facts:
        """Return the facts, without mean and standard deviation if they are not known yet."""
        *channels, height, width = self.train_images.shape[1:]
        return Facts(
            channels[0] if channels else 1,
            (height, width),
            len(self.classes),
            self.classes,
            self.mean,
            self.std,
        )

    def in_memory(self, num_workers: int) -> "LabelledImages":
        """Return the same images, read into memory."""
        val = self.val
        return replace(
            self,
            train_images=as_tensor(self.train_images, num_workers),
            test_images=as_tensor(self.test_images, num_workers),
            val=None if val is None else (as_tensor(val[0], num_workers), val[1]),
        )


def as_tensor(images: Images, num_workers: int) -> Tensor:
    """Return images in memory, uint8 (N, H, W) or (N, C, H, W)."""
    return images if isinstance(images, Tensor) else images.in_memory(num_workers)


def mean_and_std(images: Images, num_workers: int = 0) -> tuple[PerChannel, PerChannel]:
    """Return mean and standard deviation of the pixels in [0, 1] of each channel."""
    if isinstance(images, Tensor):
        chunks = iter(torch.split(images, max(1, CHUNK // images[0].numel())))
    else:
        chunks = images.chunks(num_workers)
    sums = np.sum([pixel_sums(chunk) for chunk in chunks], axis=0)
    return mean_and_std_of(sums, images.shape[0] * prod(images.shape[-2:]))


def pixel_sums(images: Tensor) -> np.ndarray:
    """Return the sum of the pixels of each channel, and the sum of their squares.

    Args:
        images: uint8 (N, H, W) or (N, C, H, W).

    Returns:
        int64 (C, 2).
    """
    pixels = images if images.dim() == 4 else images.unsqueeze(1)
    # The sums of a chunk are integers below 2**53, so they are exact in float64.
    channels = [channel.flatten().double() for channel in pixels.unbind(1)]
    sums = [[int(values.sum()), int(values.dot(values))] for values in channels]
    return np.array(sums, dtype=np.int64)


def mean_and_std_of(sums: np.ndarray, count: int) -> tuple[PerChannel, PerChannel]:
    """Return mean and standard deviation of pixels in [0, 1] from their sums.

    Args:
        sums: see `pixel_sums`.
        count: number of pixels per channel.
    """
    # Python's integers do not overflow.
    pairs = [(int(total), int(squares)) for total, squares in sums]
    means = tuple(total / count / 255 for total, _ in pairs)
    variances = [(count * squares - total**2) / count**2 for total, squares in pairs]
    # A channel with a single value is not scaled.
    return means, tuple(variance**0.5 / 255 or 1.0 for variance in variances)


def checked(returned: Any, name: str, folder: Path | None = None) -> LabelledImages:
    """Return what the function of a data set has returned, after checking it.

    Args:
        returned: see `EXPECTED`.
        name: the name of the data set.

    Raises:
        UserError: the values are not as expected.
    """
    if not isinstance(returned, tuple | list):
        refuse(name, f"a {_type(returned)}")
    if len(returned) != 5:
        refuse(name, f"{len(returned)} values")
    *arrays, names = returned
    classes = checked_classes(names, name)
    train, test = (
        _checked_part(name, part, images, labels, classes)
        for part, images, labels in zip(("train", "test"), arrays[::2], arrays[1::2], strict=True)
    )
    sizes = [tuple(images.shape[1:]) for images, _ in (train, test)]
    if sizes[0] != sizes[1]:
        refuse(name, f"train_images of shape {sizes[0]} and test_images of shape {sizes[1]}")
    return LabelledImages(*train, *test, classes, name, content_sha256(*train, *test), folder)


def _checked_part(
    name: str, part: str, images: Any, labels: Any, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the checked images and labels of a part, `train` or `test`."""
    pixels = checked_images(name, f"{part}_images", images)
    if len(pixels) == 0:
        refuse(name, f"no image in {part}_images")
    return pixels, checked_labels(name, f"{part}_labels", labels, len(pixels), classes)


def checked_labels(
    name: str, what: str, labels: Any, num_images: int, classes: Sequence[str]
) -> Tensor:
    """Return labels as int64 (N,), after checking them."""
    kind = _kind(name, what, labels)
    if "int" not in kind:
        refuse(name, f"{what} of type {kind}", "Convert the labels to int64.")
    numbers = _tensor(labels, np.int64)
    if numbers.shape != (num_images,):
        images = what.replace("labels", "images")
        refuse(name, f"{num_images:,} {images}, but {what} of shape {tuple(numbers.shape)}")
    for index in (int(numbers.argmin()), int(numbers.argmax())):
        if not 0 <= numbers[index] < len(classes):
            last = len(classes) - 1
            found = f"label {int(numbers[index])} at index {index} of {what}"
            refuse(name, found, f"With {len(classes)} class names, labels are from 0 to {last}.")
    return numbers


def checked_images(name: str, what: str, images: Any) -> Tensor:
    kind = _kind(name, what, images)
    if "float" in kind:
        advice = "If the pixels are from 0 to 1, multiply by 255, round and convert to uint8."
        refuse(name, f"{what} of type {kind}", advice)
    if kind != "uint8":
        refuse(name, f"{what} of type {kind}", "Convert the pixels, from 0 to 255, to uint8.")
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] not in CHANNELS and shape[3] in CHANNELS:
        advice = (
            "The last dimension seems to be the channels. Move it: images.permute(0, 3, 1, 2) of a "
            "tensor, images.transpose(0, 3, 1, 2) of an array."
        )
        refuse(name, f"{what} of shape {shape}", advice)
    if len(shape) not in (3, 4) or 0 in shape[1:]:
        refuse(name, f"{what} of shape {shape}")
    pixels = _tensor(images, np.uint8)
    return pixels.squeeze(1) if len(shape) == 4 and shape[1] == 1 else pixels


def _kind(name: str, what: str, value: Any) -> str:
    """Return the name of the dtype, such as `uint8`."""
    if not isinstance(value, Tensor | np.ndarray):
        refuse(name, f"a {_type(value)} as {what}")
    # NumPy's name does not contain the byte order.
    return getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))


def _tensor(value: Any, dtype: Any) -> Tensor:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    # PyTorch warns of arrays that are not writable.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def checked_classes(names: Any, name: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        refuse(name, f"a {_type(names)} as class_names")
    classes = list(names)
    for value in classes:
        if not isinstance(value, str):
            refuse(name, f"the class name {value!r}, a {_type(value)}", "Names must be strings.")
        if classes.count(value) > 1:
            refuse(name, f"the class name {value!r} more than once", "Names must differ.")
    if len(classes) < 2:
        refuse(name, f"{len(classes)} class name(s)", "At least two classes are needed.")
    return tuple(map(str, classes))


def _type(value: Any) -> str:
    return type(value).__name__


def refuse(name: str, found: str, advice: str = "") -> NoReturn:
    advice = f"{advice}\n" if advice else ""
    raise UserError(f"The data set {name!r} returned {found}.\n{advice}{EXPECTED}")


def content_sha256(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(str(tuple(tensor.shape)).encode())
        content.update(tensor.numpy().data)
    return content.hexdigest()
