"""Stratified splits and folds."""

import pytest
import torch

from bn_lightning.data.splits import Split, stratified_fold, stratified_split
from bn_lightning.errors import UserError


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


# Cross-validation


def test_folds_are_a_stratified_partition_that_depends_on_the_seed():
    labels = torch.tensor([0] * 51 + [1] * 33 + [2] * 4)[torch.randperm(88)]
    folds = [stratified_fold(labels, 5, fold, seed=3) for fold in range(5)]
    assert sorted(torch.cat([held_out for _, held_out in folds]).tolist()) == list(range(88))
    for kept, held_out in folds:
        assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(88))
        counts = labels[held_out].bincount(minlength=3)
        assert ((counts - labels.bincount() / 5).abs() < 1).all()
        assert len(held_out) in (17, 18)
    assert torch.equal(folds[2][1], stratified_fold(labels, 5, 2, seed=3)[1])
    assert not torch.equal(folds[2][1], stratified_fold(labels, 5, 2, seed=4)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_images": -1}, "val_images is -1; it must not be negative"),
        ({"folds": 1, "fold": 0}, "folds is 1; a cross-validation has at least 2"),
        ({"fold": 0}, "folds is None"),
        ({"folds": 5}, "fold is None; with --data.folds 5 it must be from 0 to 4"),
        ({"folds": 5, "fold": 5}, "fold is 5; with --data.folds 5 it must be from 0 to 4"),
        ({"folds": 5, "fold": -1}, "fold is -1"),
        ({"folds": 5, "fold": 0, "val_images": 0}, "cannot be used together"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Split(**settings)


def test_there_are_enough_samples():
    for split, whole in ((Split(100), 100), (Split(), 1), (Split(folds=9, fold=0), 8)):
        with pytest.raises(UserError, match=r"^(val_images|folds) is .* training images"):
            split.refuse_too_few(whole, whole)
    Split(99).refuse_too_few(100, 100)
    labels = torch.arange(100) % 2
    # One twelfth by default, and in proportion for a part of the data set.
    assert [len(part) for part in Split().indices(labels, 100, 0)] == [92, 8]
    assert [len(part) for part in Split(50).indices(labels, 1_000, 0)] == [95, 5]
    assert [len(part) for part in Split(0).indices(labels, 1_000, 0)] == [100, 0]
