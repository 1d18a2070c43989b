import torch

from bn_lightning.data.splits import stratified_split


def test_split_is_stratified_disjoint_and_by_seed():
    labels = torch.randint(0, 10, (5_000,), generator=torch.Generator().manual_seed(0))
    kept, held_out = stratified_split(labels, 500, seed=3)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(5_000))
    counts, share = labels[held_out].bincount(minlength=10), labels.bincount(minlength=10) / 10
    assert (counts - share).abs().max() <= 1
    assert torch.equal(held_out, stratified_split(labels, 500, seed=3)[1])
    assert not torch.equal(held_out, stratified_split(labels, 500, seed=4)[1])
    assert len(stratified_split(labels, 0, seed=3)[1]) == 0
