"""Pictures that are read from their files, one at a time."""

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from bn_lightning.data import pictures
from bn_lightning.data.image_sets import ImageSet


class PictureFiles(ImageSet):
    """Pictures of a folder, resized and cropped to squares.

    Args:
        folder: the folder.
        names: paths in the folder, as bytes (N,).
        side: height and width in pixels.
        channels: 1 or 3.
    """

    def __init__(self, folder: Path, names: np.ndarray, side: int, channels: int) -> None:
        self.folder, self.names = folder, names
        self.side, self.channels = side, channels
        self.shape = (len(names), *((channels,) if channels > 1 else ()), side, side)

    def path(self, index: int) -> Path:
        return self.folder / os.fsdecode(self.names[index])

    def __getitem__(self, index: int) -> Tensor:
        path = self.path(index)
        return pictures.read_as(path, (self.side, self.side), self.channels).pixels
