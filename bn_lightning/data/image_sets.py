"""Images that are not in memory: a map-style Dataset of raw images, read by worker processes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from bn_lightning.training.exact_data_loader import ExactDataLoader

# Images that a worker reads at a time in a pass over all of them.
CHUNK = 64


class ImageSet(Dataset[Tensor]):
    """Base class; `images[i]` is uint8, (H, W) or (C, H, W).

    Attributes:
        shape: the shape of all images in one tensor, (N, H, W) or (N, C, H, W).
    """

    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def chunks(self, num_workers: int) -> Iterator[Tensor]:
        """Read all images in their order, with a progress bar."""
        with tqdm(total=len(self), desc="reading", disable=None, leave=False) as progress:
            for chunk in ExactDataLoader(self, CHUNK, num_workers=num_workers):
                yield chunk
                progress.update(len(chunk))

    def in_memory(self, num_workers: int) -> Tensor:
        """Return all images in one tensor, uint8 of `shape`."""
        images = torch.empty(self.shape, dtype=torch.uint8)
        rest = images
        for chunk in self.chunks(num_workers):
            rest[: len(chunk)] = chunk
            rest = rest[len(chunk) :]
        return images
