"""Random numbers: the one place where the seeds of a run are derived.

The contract, for the seed of `--seed_everything`:

* weights: the global generators, seeded once before the network is built;
* data split: a function of the seed;
* order of an epoch: a function of (seed, epoch);
* augmentation of a sample: a function of (seed, epoch, sample);
* everything else in a training step, such as dropout: a function of (seed, epoch, batch, rank).

Nothing depends on what was computed before. So a resumed run draws what an uninterrupted one does,
and the samples of an epoch are the same for any number of processes.
"""

import random
import zlib

import numpy as np
import torch
from torch import Tensor


def for_split(seed: int) -> np.random.Generator:
    """Return the generator that splits validation samples off."""
    return np.random.default_rng(seed)


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits its samples: int64 (num_samples,)."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(num_samples))


def for_samples(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator for one epoch of augmentation.

    Draw for the whole data set at once and look samples up by their index: then the numbers of a
    sample depend on nothing else.
    """
    # The third number keeps it apart from the generator of `epoch_order`.
    return np.random.default_rng((seed, epoch, 1))


def seed_step(seed: int, epoch: int, batch: int, rank: int, device: torch.device) -> None:
    """Seed all global generators for one training step on one rank."""
    # NumPy's SeedSequence takes ten times as long as a checksum.
    number = zlib.crc32(f"{seed} {epoch} {batch} {rank}".encode())
    # torch.manual_seed takes half a millisecond where CUDA was not used yet.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)
    random.seed(number)
    np.random.seed(number)
