"""The stratified split."""

import torch

from bn_lightning.data.splits import stratified_split


def test_the_split_is_stratified_disjoint_and_depends_on_the_seed():
    labels = torch.randint(0, 10, (5_000,), generator=torch.Generator().manual_seed(0))
    kept, held_out = stratified_split(labels, 500, seed=3)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(5_000))
    counts, expected = labels[held_out].bincount(minlength=10), labels.bincount(minlength=10) / 10
    assert (counts - expected).abs().max() <= 1
    assert torch.equal(held_out, stratified_split(labels, 500, seed=3)[1])
    assert not torch.equal(held_out, stratified_split(labels, 500, seed=4)[1])
    assert len(stratified_split(labels, 0, seed=3)[1]) == 0


def test_both_parts_keep_the_order_of_the_data_set():
    labels = torch.arange(100) % 7
    for part in stratified_split(labels, 30, seed=0):
        assert part.dtype == torch.int64
        assert part.tolist() == sorted(part.tolist())


def test_imbalanced_classes_keep_their_proportions():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    for seed in range(5):
        _, held_out = stratified_split(labels, 100, seed)
        assert labels[held_out].bincount().tolist() == [90, 9, 1]
