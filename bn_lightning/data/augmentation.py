"""Random flips and shifts of training images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.training import seeds
from bn_lightning.training.batches import Augment

# The setting `augment`: a list, or None. Another value is refused with an example. The
# items have no type: the parser would import a `class_path` in a value of type `Any`.
TransformSettings = list | dict | str | None  # type: ignore[type-arg]


class Augmentation:
    """Random flips and shifts of one epoch.

    Those of an image depend only on seed, epoch and index of the image. They do not
    depend on the batch, on the process, or on an interruption of the run.

    Args:
        num_images: N, the size of the whole data set.
        flip: whether to flip half of the images left to right.
        shift: maximum shift in pixels along each axis; the border is filled with 0.
    """

    def __init__(self, num_images: int, seed: int, epoch: int, flip: bool, shift: int) -> None:
        random = seeds.for_samples(seed, epoch)
        self.shift = shift
        self.flips = torch.from_numpy((random.random(num_images) < 0.5) & flip)
        shifts = random.integers(-shift, shift, (num_images, 2, 1), endpoint=True)
        self.shifts = torch.from_numpy(shifts)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the images of the samples at `indices` (B,), flipped and shifted.

        Args:
            images: (B, H, W) or (B, C, H, W).
        """
        device, (height, width) = images.device, images.shape[-2:]
        # The first batch of an epoch copies these to a GPU, for all its batches.
        self.flips, self.shifts = self.flips.to(device), self.shifts.to(device)
        flips, shifts = self.flips[indices], self.shifts[indices]
        padded = F.pad(images, [self.shift] * 4)
        padded_width = padded.shape[-1]
        rows = torch.arange(height, device=device) + self.shift - shifts[:, 0]  # (B, H)
        columns = torch.arange(width, device=device) + self.shift - shifts[:, 1]  # (B, W)
        columns = torch.where(flips[:, None], padded_width - 1 - columns, columns)
        positions = rows[:, :, None] * padded_width + columns[:, None, :]  # (B, H, W)
        positions = positions.view(len(images), *[1] * (images.ndim - 3), -1)
        positions = positions.expand(*images.shape[:-2], -1)
        return padded.flatten(-2).gather(-1, positions).view_as(images)


def in_sequence(augmentations: Sequence[Augment]) -> Augment | None:
    """Return an augmentation that applies several in their order, or None if there are none."""

    def apply(images: Tensor, indices: Tensor) -> Tensor:
        for augment in augmentations:
            images = augment(images, indices)
        return images

    return apply if augmentations else None
