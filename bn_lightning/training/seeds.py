"""Random numbers: all seeds of a run are derived here.

The contract, for the seed of `--seed_everything`:

* weights: the global generators, seeded once before the network is created;
* data split: a function of the seed;
* order of an epoch: a function of (seed, epoch);
* samples for precise statistics: a function of the seed;
* augmentation of a sample, also one that draws from torch's global generator, and everything
  else while a sample is read by an `ExactDataLoader`: a function of (seed, epoch, sample);
* everything else in a training step, such as dropout: a function of (seed, epoch, batch, rank);
* global generators while a batch is fetched, such as those of a user's transform: another
  function of (seed, epoch, batch, rank); while the iterator of a loader is created: one of
  (seed, epoch, rank).

Random numbers never depend on earlier computation. So a resumed run draws the same
numbers as an uninterrupted run, and an epoch has the same samples for any number of
processes.
"""

import random
import zlib

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor


def for_split(seed: int) -> np.random.Generator:
    """Return the generator of the split into training and validation samples."""
    return np.random.default_rng(seed)


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the samples in an epoch, int64 (num_samples,)."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(num_samples))


def shuffled(indices: Tensor, seed: int, epoch: int, trainer: pl.Trainer | None) -> Tensor:
    """Return sample indices in the order of an epoch."""
    if trainer is not None and trainer.overfit_batches:  # type: ignore[attr-defined]
        return indices  # the same batches in each epoch
    return indices[epoch_order(len(indices), seed, epoch)]


def for_samples(seed: int, epoch: int) -> np.random.Generator:
    """Return the generator of the augmentation in one epoch.

    Draw numbers for the whole data set at once, and index them by sample. Then the
    numbers of a sample do not depend on its position in the epoch.
    """
    # The third number distinguishes it from the generator of `epoch_order`.
    return np.random.default_rng((seed, epoch, 1))


def of_samples(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return a seed for each sample in one epoch, int64 (num_samples,).

    It is for transforms of a sample that draw from torch's global generator.
    """
    return _numbers(num_samples, (seed, epoch, 2))


def of_reads(num_samples: int, seed: int, epoch: int | None) -> Tensor:
    """Return a seed for reading each sample in one epoch, int64 (num_samples,).

    Args:
        epoch: None for evaluation, which has the same numbers in each pass.
    """
    return _numbers(num_samples, (seed, 0, 4) if epoch is None else (seed, epoch, 3))


def statistics_order(num_samples: int, seed: int) -> Tensor:
    """Return the order of the samples for precise statistics, int64 (num_samples,).

    It is the same throughout a run.
    """
    return torch.from_numpy(np.random.default_rng((seed, 0, 5)).permutation(num_samples))


def _numbers(count: int, key: tuple[int, ...]) -> Tensor:
    # torch's generator on the CPU uses only 32 bits of a seed.
    return torch.from_numpy(np.random.default_rng(key).integers(2**32, size=count))


def seed_step(seed: int, epoch: int, batch: int, rank: int, device: torch.device) -> None:
    """Seed all global generators for one training step on one rank."""
    _seed_all(f"{seed} {epoch} {batch} {rank}", device)


def seed_fetch(seed: int, epoch: int, batch: int, rank: int, device: torch.device) -> None:
    """Seed all global generators before a batch is fetched on one rank.

    Batch -1 stands for the creation of the loader's iterator.
    """
    _seed_all(f"{seed} {epoch} {batch} {rank} fetch", device)


def seed_read(number: int) -> None:
    """Seed all global generators on the CPU before one sample is read."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _seed_all(key: str, device: torch.device) -> None:
    # A checksum is ten times as fast as NumPy's SeedSequence.
    number = zlib.crc32(key.encode())
    # torch.manual_seed takes 0.5 ms if CUDA has not been initialized.
    seed_read(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
