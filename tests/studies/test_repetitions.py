"""The repetitions of a comparison, and their titles."""

import pytest

from bn_lightning.studies.repetitions import Repetition, count, product

FOLD = (("data.fold", "3"),)


def test_titles_folders_and_flags():
    assert (str(Repetition(2)), Repetition(2).folder) == ("seed 2", "seed-2")
    one = Repetition(2, FOLD)
    assert (str(one), one.folder) == ("seed 2, fold 3", "seed-2/fold-3")
    assert (Repetition(2).flags, one.flags) == ([], ["--data.fold", "3"])


@pytest.mark.parametrize(
    ("seeds", "folds", "shown"),
    [
        (1, (), "1 seed"),
        (3, (), "3 seeds"),
        (1, "0", "1 fold"),
        (1, "01234", "5 folds"),
        (2, "0", "2 seeds"),
        (2, "012", "2 seeds and 3 folds"),
    ],
)
def test_repetitions_are_counted_in_words(seeds, folds, shown):
    found = product(seeds, {"data.fold": list(folds)} if folds else {})
    assert len(set(found)) == seeds * max(1, len(folds))
    assert count(found) == shown
