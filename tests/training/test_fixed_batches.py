"""Loaders of fixed samples, `ShardedBatches.fixed`."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bn_lightning.training.batches import Epoch, TensorBatches
from bn_lightning.training.exact_data_loader import ExactDataLoader


class Noisy(Dataset):
    """Samples with random numbers of the three global generators."""

    def __len__(self):
        return 53

    def __getitem__(self, index):
        noise = torch.rand(2) + np.random.rand() + random.random()
        return torch.full((2,), 100.0 * index) + noise, index


class Tenth(nn.Module):
    def forward(self, x):
        return x.float() / 10


INDICES = torch.tensor([7, 51, 3, 20, 21, 2, 40, 9, 11, 30, 1])


def tensor_batches(rank=0, world_size=1, for_training=True):
    values = torch.arange(53 * 4, dtype=torch.uint8).view(53, 4)
    train = torch.arange(5, 50)

    def augmented():
        return Epoch(train.flip(0), first=2, augment=lambda x, indices: x * 0, number=3)

    epoch = augmented if for_training else None
    return TensorBatches(
        values, torch.arange(53), train, 4, epoch, rank, world_size, preprocessing=Tenth()
    )


def file_batches(num_workers=0, **settings):
    return ExactDataLoader(
        Noisy(), 4, shuffle=True, num_workers=num_workers, seed=7, preprocessing=Tenth(), **settings
    )


def test_tensors_are_returned_in_the_given_order_without_augmentation():
    loader = tensor_batches()
    fixed = loader.fixed(INDICES)
    assert len(fixed) == 3
    for _ in range(2):
        batches = list(fixed)
        assert torch.equal(torch.cat([targets for _, targets in batches]), INDICES)
        assert [len(targets) for _, targets in batches] == [4, 4, 3]
        inputs = torch.cat([inputs for inputs, _ in batches])
        assert torch.equal(inputs, loader.inputs[INDICES].float() / 10)


def test_the_loader_itself_is_unchanged():
    for loader in (tensor_batches(), file_batches()):
        indices, before = loader.indices.clone(), list(loader)
        list(loader.fixed(INDICES, lambda x, indices: x + 1))
        assert torch.equal(loader.indices, indices)
        after = list(loader)
        assert len(after) == len(before)
        for (a, b), (c, d) in zip(before, after, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_of_a_dataset_are_those_of_evaluation(num_workers):
    """Their random numbers are the same in each pass, and for any number of workers."""
    fixed = file_batches(num_workers).fixed(INDICES)
    truth = torch.cat([file_batches().take(part)[0] for part in INDICES.split(4)])
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for _ in range(2):
        batches = list(fixed)
        assert torch.equal(torch.cat([targets for _, targets in batches]), INDICES)
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), truth)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["tensors", "samples"])
def test_an_augmentation_gets_samples_and_indices_before_preprocessing(kind):
    loader = tensor_batches() if kind == "tensors" else file_batches()
    seen = []

    def augment(x, indices):
        seen.append((x.clone(), indices))
        return x * 0 + indices.unsqueeze(1)

    batches = list(loader.fixed(INDICES, augment))
    assert torch.equal(torch.cat([indices for _, indices in seen]), INDICES)
    assert all(x.amax() > 10 for x, _ in seen)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(inputs, INDICES.unsqueeze(1).expand_as(inputs).float() / 10)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("count", [4, 8, 9, 10, 11])
def test_all_ranks_get_a_sample_of_each_batch(world_size, count):
    chosen = INDICES[:count]
    shards = [
        [targets for _, targets in tensor_batches(rank, world_size).fixed(chosen)]
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in shards}) == 1
    assert all(len(targets) for batches in shards for targets in batches)
    visited = torch.cat([torch.cat(parts) for parts in zip(*shards, strict=True)])
    assert torch.equal(visited, chosen)
    sizes = [sum(map(len, parts)) for parts in zip(*shards, strict=True)]
    fixed = tensor_batches(0, world_size).fixed(chosen)
    assert [fixed.size_of(number) for number in range(len(fixed))] == sizes


def test_a_loader_of_evaluation_can_be_fixed_too():
    fixed = tensor_batches(for_training=False).fixed(INDICES)
    assert torch.equal(torch.cat([targets for _, targets in fixed]), INDICES)
