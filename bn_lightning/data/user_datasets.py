"""Map-style Datasets that a function of the user returns, instead of tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from bn_lightning.data.image_sets import CHUNK, ImageSet
from bn_lightning.data.labelled_images import (
    LabelledImages,
    checked_classes,
    checked_images,
    checked_labels,
    content_sha256,
    refuse,
)
from bn_lightning.training.exact_data_loader import ExactDataLoader


def load(returned: Sequence[Any], name: str, num_workers: int) -> LabelledImages:
    """Return the images and labels of two Datasets.

    Labels are read from the attribute `targets` of a Dataset, as those of torchvision
    have it. Without it, all samples are read once.

    Args:
        returned: the Datasets of training and test, and the names of the classes.
        name: name of the data set.
        num_workers: number of processes that read samples.

    Raises:
        UserError: the values are not as expected.
    """
    train_dataset, test_dataset, names = returned
    classes = checked_classes(names, name)
    train, train_labels = _part("train", train_dataset, name, classes, num_workers)
    test, test_labels = _part("test", test_dataset, name, classes, num_workers)
    if train.shape[1:] != test.shape[1:]:
        shapes = f"{tuple(train.shape[1:])} for training and {tuple(test.shape[1:])} for the test"
        refuse(name, f"images of shape {shapes}")
    # The images may be too many to read all of them for a checksum.
    checksum = content_sha256(train_labels, test_labels)
    return LabelledImages(train, train_labels, test, test_labels, classes, name, checksum)


def _part(
    part: str, dataset: Any, name: str, classes: Sequence[str], num_workers: int
) -> tuple["UserImages", Tensor]:
    images = UserImages(dataset, name, f"{part}_dataset")
    labels = images.targets
    if labels is None:
        labels = _read_labels(images, num_workers)
    return images, checked_labels(name, f"{part}_dataset labels", labels, len(images), classes)


def _read_labels(images: "UserImages", num_workers: int) -> np.ndarray:
    labels = ExactDataLoader(_Labels(images), CHUNK, num_workers=num_workers, collate_fn=np.array)
    progress = tqdm(labels, "reading labels", disable=None, leave=False)
    return np.concatenate([*progress])


class _Labels(Dataset[Any]):
    def __init__(self, images: "UserImages") -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return np.asarray(self.images.sample(index)[1])


class UserImages(ImageSet):
    """The images of a user's Dataset.

    Args:
        dataset: `dataset[i]` is (image, label). The image is a Pillow image, or uint8 (H,
            W) or (C, H, W) as a tensor or a NumPy array.
        name: name of the data set, for messages.
        what: `train_dataset` or `test_dataset`, for messages.

    Attributes:
        targets: the labels that the attribute `targets` of the Dataset holds; None without it.

    Raises:
        UserError: the first image is not as expected, or there is none.
    """

    def __init__(self, dataset: Dataset[Any], name: str, what: str) -> None:
        self.dataset, self.name, self.what = dataset, name, what
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            refuse(name, f"a {type(dataset).__name__} as {what}", "It has no length or no items.")
        if len(dataset) == 0:
            refuse(name, f"no sample in {what}")
        targets = getattr(dataset, "targets", None)
        self.targets = None if targets is None else np.asarray(targets)
        self.shape = (len(dataset), *self.sample(0)[0].shape)

    def sample(self, index: int) -> tuple[Tensor, Any]:
        """Return the checked image and the label of a sample."""
        sample = self.dataset[index]
        what = f"{self.what}[{index}]"
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            refuse(self.name, f"a {type(sample).__name__} as {what}", "Return (image, label).")
        image, label = sample
        if isinstance(image, Image.Image):
            image = np.array(image.convert("L" if image.mode in ("L", "1") else "RGB"))
            image = image.transpose(2, 0, 1) if image.ndim == 3 else image
        pixels = checked_images(self.name, f"the image of {what}", image[None])[0]
        return pixels, label

    def __getitem__(self, index: int) -> Tensor:
        pixels, label = self.sample(index)
        if self.targets is not None and np.any(np.asarray(label) != self.targets[index]):
            found = f"the label {label} in {self.what}[{index}]"
            held = f"{self.what}.targets[{index}] is {self.targets[index]}"
            refuse(self.name, found, f"Both must be the same, but {held}.")
        if pixels.shape != self.shape[1:]:
            found = f"an image of shape {tuple(pixels.shape)} as {self.what}[{index}]"
            first = f"{self.what}[0] has the shape {tuple(self.shape[1:])}"
            refuse(self.name, found, f"All images must have one size, and {first}.")
        return pixels
