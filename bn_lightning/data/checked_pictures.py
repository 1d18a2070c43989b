"""The check of all pictures before the first step: each is read once, and the result is kept."""

import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from bn_lightning.data import pictures
from bn_lightning.data.folder_parts import Part
from bn_lightning.data.labelled_images import DataError, PerChannel, mean_and_std_of, pixel_sums
from bn_lightning.data.picture_files import PictureFiles
from bn_lightning.data.torchvision_sets import locked
from bn_lightning.training.checkpoints import write_atomically
from bn_lightning.training.exact_data_loader import ExactDataLoader

# To be raised if `pictures.read_as` returns other pixels than before.
VERSION = 1
# Pictures that a worker reads before it returns the results.
CHUNK = 16
# A killed process loses at most the results of this time.
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Checked:
    """The result of the check.

    Attributes:
        errors: why a picture cannot be read, in one line, by its index.
        sums: for each picture after resizing, the sum of the pixels of each channel, and
            the sum of their squares, int64 (N, C, 2); 0 if it cannot be read.
    """

    errors: dict[int, str]
    sums: np.ndarray


def check(
    folder: Path, part: Part, side: int, channels: int, root: Path, num_workers: int
) -> Checked:
    """Read all pictures once, with a progress bar at a terminal.

    The result is kept in `root`. The next check reads only the pictures that are new or
    have another size or time, and those that could not be read: the reason may have
    been a permission or a file system, which size and time do not show.

    If the result cannot be kept, a warning is printed. An exception, such as that of
    Ctrl-C, keeps what has been checked.

    Args:
        folder: the folder of the pictures.
        part: all of its pictures; results for others are removed.
        side: height and width to which pictures are resized.
        channels: 1 or 3.
        root: folder in which the result is kept, in `checked/`.
        num_workers: number of worker processes; with 0, this process reads.

    Raises:
        WorkerFailed: a worker process has ended.
    """
    results = _Results(_file(folder, side, channels, root), part, channels)
    results.load()
    if results.is_good.all():
        return Checked({}, results.sums)
    errors = {}
    with ExitStack() as stack:
        try:
            # Another process may check the same pictures.
            stack.enter_context(locked(results.file.parent))
            results.load()
        except DataError as error:
            results.do_not_keep(error)
        waiting = np.flatnonzero(~results.is_good)
        files = PictureFiles(folder, part.names, side, channels)
        found = _read(files, waiting, num_workers)
        try:
            for index, result in zip(waiting.tolist(), found, strict=True):
                if isinstance(result, str):
                    errors[index] = result
                else:
                    results.add(index, result)
        finally:
            results.save()
    return Checked(errors, results.sums)


def mean_and_std(sums: np.ndarray, num_pixels: int) -> tuple[PerChannel, PerChannel]:
    """Return mean and standard deviation of the pixels in [0, 1] of each channel.

    Args:
        sums: those of `Checked`, of the pictures to use, int64 (N, C, 2).
        num_pixels: number of pixels per picture.
    """
    return mean_and_std_of(sums.sum(0), len(sums) * num_pixels)


class _Results:
    """The sums of the pictures that can be read.

    Args:
        file: an archive of arrays with the results of the last check. If it is missing
            or not readable, all pictures are checked.
        part: the pictures.

    Attributes:
        is_good: which pictures have been read, bool (N,).
        sums: see `Checked`.
    """

    def __init__(self, file: Path, part: Part, channels: int) -> None:
        self.file = file
        self.part = part
        self.is_good = np.zeros(len(part), dtype=bool)
        self.sums = np.zeros((len(part), channels, 2), dtype=np.int64)
        self._is_kept = True
        self._is_new = False
        self._saved_at = time.monotonic()

    def load(self) -> None:
        part = self.part
        kept = self._kept()
        if kept is None:
            return
        names, sizes, times, sums = kept
        # The names are sorted. A name that is not among them has the place of another one.
        place = np.searchsorted(names, part.names).clip(max=len(names) - 1)
        is_kept = names[place] == part.names
        is_kept &= (sizes[place] == part.sizes) & (times[place] == part.times)
        self.is_good |= is_kept
        self.sums[is_kept] = sums[place[is_kept]]

    def _kept(self) -> list[np.ndarray] | None:
        """Return names, sizes, times and sums of the last check; None if there are none."""
        try:
            with np.load(self.file, allow_pickle=False) as archive:
                kept = [archive[name] for name in ("names", "sizes", "times", "sums")]
            count = len(kept[0])
        # NumPy raises exceptions of many classes for a truncated or foreign file.
        except Exception:
            return None
        shapes = [(count,), (count,), (count,), (count, *self.sums.shape[1:])]
        is_intact = (
            count > 0
            and [array.shape for array in kept] == shapes
            and [array.dtype.kind for array in kept] == ["S", "i", "i", "i"]
        )
        return kept if is_intact else None

    def add(self, index: int, sums: np.ndarray) -> None:
        self.is_good[index], self.sums[index] = True, sums
        self._is_new = True
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the results if there are new ones."""
        if not (self._is_kept and self._is_new):
            return
        good = np.flatnonzero(self.is_good)
        good = good[np.argsort(self.part.names[good])]
        part = self.part.select(good)
        content = io.BytesIO()
        np.savez(
            content, names=part.names, sizes=part.sizes, times=part.times, sums=self.sums[good]
        )
        try:
            write_atomically(self.file, content.getbuffer())
        except OSError as error:
            self.do_not_keep(error)
        self._is_new = False
        self._saved_at = time.monotonic()

    def do_not_keep(self, error: Exception) -> None:
        self._is_kept = False
        reason = str(error).partition("\n")[0]
        print(f"WARNING: the next run will check all pictures again: {reason}", file=sys.stderr)


def _file(folder: Path, side: int, channels: int, root: Path) -> Path:
    """Return the file for the results of a folder."""
    # Another version of Pillow may read other pixels.
    key = [os.fsencode(folder.resolve()), side, channels, PIL.__version__, VERSION]
    return root / "checked" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz"


def _read(files: PictureFiles, indices: np.ndarray, num_workers: int) -> Iterator[np.ndarray | str]:
    """Read pictures in the order of `indices`, and yield the sums of each, or why it is broken."""
    # Another process may have read all.
    if not len(indices):
        return
    loader = ExactDataLoader(
        _Reader(files),
        CHUNK,
        num_workers=num_workers,
        collate_fn=list,
        indices=torch.from_numpy(indices),
    )
    with tqdm(total=len(indices), desc="checking", disable=None, leave=False) as progress:
        for results in loader:
            yield from results
            progress.update(len(results))


class _Reader(Dataset[Any]):
    """Reads a picture, and returns its sums, int64 (C, 2), or the reason why it is broken."""

    def __init__(self, files: PictureFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            pixels = self.files[index]
        except pictures.PictureError as error:
            path = self.files.path(index)
            return str(error).removeprefix(f"{path}: ").partition("\n")[0]
        return pixel_sums(pixels.unsqueeze(0))
