"""Random flips and shifts of training images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bn_lightning.training import seeds


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
        """Return the images (B, H, W) of the samples at `indices` (B,), flipped and shifted."""
        device, (height, width) = images.device, images.shape[1:]
        # The first batch of an epoch copies these to a GPU, for all its batches.
        self.flips, self.shifts = self.flips.to(device), self.shifts.to(device)
        flips, shifts = self.flips[indices], self.shifts[indices]
        padded = F.pad(images, [self.shift] * 4)
        rows = torch.arange(height, device=device) + self.shift - shifts[:, 0]  # (B, H)
        columns = torch.arange(width, device=device) + self.shift - shifts[:, 1]  # (B, W)
        columns = torch.where(flips[:, None], padded.shape[2] - 1 - columns, columns)
        positions = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
        return padded.flatten(1).gather(1, positions.flatten(1)).view_as(images)
