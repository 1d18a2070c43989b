"""Mirrored and shifted training images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.training import seeds


class Augmentation:
    """Mirrors and shifts of one epoch, for each image a function of (seed, epoch, image).

    So they are the same in any batch, on any process, and in any part of an interrupted run.

    Args:
        num_images: N, of the whole data set.
        flip: whether half of the images are mirrored, left to right.
        shift: the most pixels by which an image is moved along each axis; the border is black.
    """

    def __init__(self, num_images: int, seed: int, epoch: int, flip: bool, shift: int) -> None:
        random = seeds.for_samples(seed, epoch)
        self.shift = shift
        self.flips = torch.from_numpy((random.random(num_images) < 0.5) & flip)
        shifts = random.integers(-shift, shift, (num_images, 2, 1), endpoint=True)
        self.shifts = torch.from_numpy(shifts)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the images (B, H, W), those of the data set at `indices` (B,), augmented."""
        device, (height, width) = images.device, images.shape[1:]
        flips = self.flips[indices.cpu()].to(device)
        shifts = self.shifts[indices.cpu()].to(device)
        padded = F.pad(images, [self.shift] * 4)
        rows = torch.arange(height, device=device) + self.shift - shifts[:, 0]  # (B, H)
        columns = torch.arange(width, device=device) + self.shift - shifts[:, 1]  # (B, W)
        columns = torch.where(flips[:, None], padded.shape[2] - 1 - columns, columns)
        places = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.flatten(1).gather(1, places.flatten(1)).view_as(images)
