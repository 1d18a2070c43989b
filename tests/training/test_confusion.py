"""The classes of a confusion matrix that a report shows."""

import numpy as np
import pytest
import torch

from bn_lightning.training.confusion import describe_selection, reported_classes, short_name


@pytest.mark.parametrize("num_classes", [2, 20])
def test_all_of_few_classes_are_shown_in_order(num_classes):
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
    assert reported_classes(counts) == [*range(num_classes)]
    assert describe_selection(counts) == ""


def test_of_many_classes_those_with_the_lowest_accuracy_are_shown():
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, (100, 100)) + np.diag(random.integers(0, 900, 100))
    counts[[3, 50, 99]] = 0
    shown = reported_classes(torch.tensor(counts))
    tested = np.delete(np.arange(100), [3, 50, 99])
    accuracy = {int(c): counts[c, c] / counts[c].sum() for c in tested}
    assert len(shown) == 20
    assert [accuracy[c] for c in shown] == sorted(accuracy.values())[:20]
    assert describe_selection(torch.tensor(counts)) == (
        "The 20 of 100 classes with the lowest test accuracy; 3 have no test samples"
    )


def test_of_equal_classes_those_with_the_most_mistakes_are_shown():
    counts = torch.diag(torch.ones(24, dtype=torch.long)).roll(1, 1)  # always wrong
    counts[[5, 17], 0] = 40
    assert reported_classes(counts)[:2] == [5, 17]
    assert len(reported_classes(counts)) == 20


def test_classes_without_test_samples_are_not_among_the_worst():
    counts = torch.diag(torch.tensor([5] * 3 + [0] * 27))
    assert reported_classes(counts) == [0, 1, 2]
    assert describe_selection(counts).endswith("; 27 have no test samples")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("a" * 24, "a" * 24),
        ("first, and a long name, last", "first, and...name, last"),
        (" one\n two ", "one two"),
    ],
)
def test_long_names_are_shortened_in_the_middle(name, short):
    assert short_name(name) == short
