"""Batches of tensors in memory, and their shards."""

import pytest
import torch
from torch import nn

from bn_lightning.training.batches import Epoch, ExactLoader, TensorBatches
from bn_lightning.training.seeds import epoch_order

INPUTS, TARGETS, INDICES = torch.arange(50, dtype=torch.uint8), torch.arange(50), torch.arange(50)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shards_of_all_ranks_form_the_batch(world_size):
    images = INPUTS.view(50, 1, 1)

    def batches(rank=0, world_size=1):
        epoch = Epoch(epoch_order(50, 0, 0))
        return TensorBatches(images, TARGETS, INDICES, 16, lambda: epoch, rank, world_size)

    expected = [batch for _, batch in batches()]
    shards = [[batch for _, batch in batches(rank, world_size)] for rank in range(world_size)]
    for number, batch in enumerate(expected):
        assert torch.equal(torch.cat([shard[number] for shard in shards]), batch)
        assert len(batch) == batches().size_of(number)


def test_the_last_batch_may_be_smaller():
    batches = TensorBatches(INPUTS, TARGETS, INDICES, 16)
    assert [len(targets) for _, targets in batches] == [16, 16, 16, 2]
    assert (len(batches), [batches.size_of(n) for n in range(4)]) == (4, [16, 16, 16, 2])
    assert len(TensorBatches(INPUTS, TARGETS, INDICES[:48], 16)) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [5, 7, 16, 24, 48, 49, 50, 60])
def test_evaluation_gives_each_rank_samples_of_each_batch(batch_size, world_size):
    """49 + 1, 48 + 2 and 7 * 7 + 1 leave an empty shard for some of the ranks."""
    ranks = [
        TensorBatches(INPUTS, TARGETS, INDICES, batch_size, None, rank, world_size)
        for rank in range(world_size)
    ]
    shards = [[targets for _, targets in batches] for batches in ranks]
    sizes = [sum(map(len, parts)) for parts in zip(*shards, strict=True)]
    assert all(len(shard) for batches in shards for shard in batches)
    assert len(ranks[0]) == len(sizes)
    assert [ranks[0].size_of(number) for number in range(len(sizes))] == sizes
    visited = torch.cat([torch.cat(parts) for parts in zip(*shards, strict=True)])
    assert torch.equal(visited, INDICES)
    if world_size == 1:
        assert sizes == [len(part) for part in INDICES.split(batch_size)]


def test_without_an_epoch_the_order_is_that_of_the_indices():
    some = torch.tensor([7, 3, 9])
    [(inputs, targets)] = TensorBatches(INPUTS, TARGETS, some, 16)
    assert inputs.tolist() == targets.tolist() == [7, 3, 9]


def test_the_epoch_is_determined_when_the_first_batch_is_requested():
    """Lightning calls iter() before it restores the number of the epoch."""
    now = 0
    batches = TensorBatches(INPUTS, TARGETS, INDICES, 16, lambda: Epoch(INDICES, first=now))
    early = iter(batches)
    now = 2
    assert [targets.tolist() for _, targets in early] == [list(range(32, 48)), [48, 49]]
    assert batches.state_dict() == {}


def test_samples_are_augmented_by_index_and_then_preprocessed():
    class Halved(nn.Module):
        def forward(self, inputs):
            return inputs / 2

    epoch = Epoch(INDICES.flip(0), 0, lambda inputs, indices: inputs + 2 * indices)
    batches = TensorBatches(INPUTS, TARGETS, INDICES, 25, lambda: epoch, 1, 2, Halved())
    inputs, targets = next(iter(batches))
    assert targets.tolist() == list(range(36, 24, -1))  # the second shard of 25 samples
    assert torch.equal(inputs, 1.5 * targets)
    inputs, _ = batches.take(torch.tensor([4]))
    assert inputs.tolist() == [2.0]  # without augmentation


def test_a_subclass_must_implement_the_sizes():
    class Incomplete(ExactLoader):
        def __iter__(self):
            return iter(())

    loader = Incomplete()
    with pytest.raises(NotImplementedError):
        len(loader)
    with pytest.raises(NotImplementedError):
        loader.size_of(0)
