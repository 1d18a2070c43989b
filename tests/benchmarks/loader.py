"""Compare the loader of a folder of pictures with a plain DataLoader of PyTorch.

    python tests/benchmarks/loader.py [--pairs 15] [--pictures 1000] [--resize 64]
        [--workers 2] [--batch_size 64] [--profile]

Both read the same JPEG files of 500x375 pixels with the same function, with the same number
of workers, batch size and transforms: random crop, colour jitter, flip, normalization.

* exact: the training loader of `ImageData`, with the transforms of `--data.augment`. The
         training process normalizes whole batches.
* plain: a Dataset with `torchvision.transforms.v2.Compose` per picture, and a DataLoader

Each pair reads one epoch with each of them, in alternating order, in this process. The time
of an epoch includes the start of its workers. The output shows the median and the quartiles
of the images per second, of the ratio within a pair, and of the seconds to the first batch.

With --profile, one epoch of each is read without workers, and the functions that take most
of the time are printed.
"""

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import write_photographs
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bn_lightning import ImageData
from bn_lightning.data import pictures


class Pictures(Dataset[Any]):
    """Pictures as a user would read them for a plain DataLoader."""

    def __init__(self, paths: list[Path], labels: list[int], side: int, transform: Any) -> None:
        self.paths, self.labels = paths, labels
        self.side, self.transform = side, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = pictures.read_as(self.paths[index], (self.side, self.side), channels=3)
        return self.transform(picture.pixels), self.labels[index]


def make_loaders(
    folder: Path, side: int, batch_size: int, workers: int
) -> dict[str, Iterable[Any]]:
    """Return a loader of each kind, for the same training pictures."""
    crop = {"size": side, "padding": side // 8}
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    data = ImageData(
        "folder",
        {"path": str(folder / "pictures")},
        root=str(folder),
        resize=side,
        normalize=True,
        augment=[
            {"name": "RandomCrop", "args": crop},
            {"name": "ColorJitter", "args": jitter},
            {"name": "RandomHorizontalFlip"},
        ],
        batch_size=batch_size,
        workers=workers,
    )
    data.setup("fit")
    transform = v2.Compose(
        [
            v2.RandomCrop(**crop),
            v2.ColorJitter(**jitter),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.facts.mean, data.facts.std),
        ]
    )
    images: Any = data.images
    indices = data.train_indices.tolist()
    names = images.train_images.names
    paths = [images.folder / os.fsdecode(names[index]) for index in indices]
    labels = images.train_labels[data.train_indices].tolist()
    dataset = Pictures(paths, labels, side, transform)
    return {
        "exact": data.train_dataloader(),
        "plain": DataLoader(dataset, batch_size, shuffle=True, num_workers=workers),
    }


def read(loader: Iterable[Any]) -> tuple[float, float]:
    """Read one epoch, and return images per second and the seconds to the first batch."""
    start = time.perf_counter()
    count, first = 0, 0.0
    for images, _ in loader:
        first = first or time.perf_counter() - start
        count += len(images)
    return count / (time.perf_counter() - start), first


def profile(loader: Iterable[Any]) -> None:
    with cProfile.Profile() as profiler:
        read(loader)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="number of pairs (default: 15)")
    parser.add_argument(
        "--pictures", type=int, default=1000, help="number of files (default: 1000)"
    )
    parser.add_argument("--resize", type=int, default=64, help="height and width (default: 64)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--batch_size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--profile", action="store_true", help="profile one epoch of each instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "pictures", args.pictures)
        workers = 0 if args.profile else args.workers
        loaders = make_loaders(folder, args.resize, args.batch_size, workers)
        if args.profile:
            for kind, loader in loaders.items():
                print(f"\n{kind}:")
                profile(loader)
            return
        compare(loaders, args.pairs)


def compare(loaders: dict[str, Iterable[Any]], pairs: int) -> None:
    speeds: dict[str, list[float]] = {kind: [] for kind in loaders}
    firsts: dict[str, list[float]] = {kind: [] for kind in loaders}
    for number in range(pairs + 1):
        # Reversed in every second pair.
        for kind in list(loaders)[:: 1 if number % 2 else -1]:
            speed, first = read(loaders[kind])
            # The first pair is a warm-up that fills the file cache. It is not recorded.
            if number > 0:
                speeds[kind].append(speed)
                firsts[kind].append(first)
        if number > 0:
            shown = "  ".join(f"{kind} {speeds[kind][-1]:7,.1f} images/s" for kind in loaders)
            print(f"pair {number:2}  {shown}", flush=True)

    print(f"\n{pairs} pairs: median (quartiles)")
    for kind in loaders:
        speed, first = quartiles(speeds[kind], "7,.1f"), quartiles(firsts[kind], ".3f")
        print(f"{kind:6} {speed} images/s, first batch after {first} s")
    ratios = np.array(speeds["exact"]) / np.array(speeds["plain"])
    print(f"exact / plain: {quartiles(ratios, '.3f')}")


def quartiles(values: Any, form: str) -> str:
    low, median, high = (format(value, form) for value in np.percentile(values, (25, 50, 75)))
    return f"{median} ({low.strip()} to {high.strip()})"


if __name__ == "__main__":
    main()
