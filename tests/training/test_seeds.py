"""Random numbers are functions of the seed and the position in the run."""

import random

import numpy as np
import torch

from bn_lightning.training import seeds
from bn_lightning.training.seeds import epoch_order


def test_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(1_000, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(1_000))
    torch.manual_seed(5)
    assert torch.equal(order, epoch_order(1_000, seed=1, epoch=2))
    assert not torch.equal(order, epoch_order(1_000, seed=2, epoch=1))
    assert not torch.equal(order, epoch_order(1_000, seed=1, epoch=3))


def drawn():
    return (torch.rand(3).tolist(), random.random(), np.random.random())


def test_the_numbers_of_a_step_do_not_depend_on_earlier_numbers():
    position = (7, 2, 5, 1, torch.device("cpu"))
    seeds.seed_step(*position)
    first = drawn()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    seeds.seed_step(*position)
    assert drawn() == first


def test_seed_epoch_batch_and_rank_each_change_the_numbers():
    position = [7, 2, 5, 1]
    others = [[value + (n == changed) for n, value in enumerate(position)] for changed in range(4)]
    found = []
    for numbers in (position, *others, [72, 5, 1, 0], [7, 25, 1, 0]):
        seeds.seed_step(*numbers, torch.device("cpu"))
        found.append(drawn())
    for number, draw in enumerate(zip(*found, strict=True)):
        assert len(set(map(str, draw))) == len(found), ("torch", "random", "numpy")[number]


def test_augmentation_order_and_split_use_different_numbers():
    """A flip must not depend on the position of a sample in the epoch."""
    drawn_by = [seeds.for_samples(3, 1), seeds.for_samples(3, 2), seeds.for_split(3)]
    permutations = [generator.permutation(100).tolist() for generator in drawn_by]
    permutations.append(epoch_order(100, 3, 1).tolist())
    assert len(set(map(tuple, permutations))) == 4
    assert seeds.for_samples(3, 1).permutation(100).tolist() == permutations[0]


def test_neighbouring_seeds_and_epochs_share_no_more_seeds_of_samples_than_chance():
    runs = [seeds.of_samples(60_000, seed, epoch) for seed in range(4) for epoch in range(4)]
    numbers = torch.cat(runs)
    assert numbers.min() >= 0 and 2**31 < numbers.max() < 2**32
    # With n numbers out of 2^32, n^2 / 2^33 pairs are equal on average: 107, with a standard
    # deviation of 10.
    equal = len(numbers) - len(numbers.unique())
    assert 60 < equal < 160
    assert all((one == other).sum() <= 1 for one in runs for other in runs if one is not other)
