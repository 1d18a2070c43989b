"""Tests of the split: samples of the evaluation are not trained on."""

import warnings
from collections import Counter

import pytest

from bn_lightning.testing.data.base import NOUNS, LoaderTests, inputs_over
from bn_lightning.testing.data.reading import Reading
from bn_lightning.testing.failures import counted, fail, shown

# Share of the validation or test set that may be identical with training samples. Published data
# sets contain duplicates.
MAX_IDENTICAL = 0.01


class SplitTests(LoaderTests):
    """Held-out samples are never trained on, and the split is always the same."""

    def test_held_out_samples_are_never_trained_on(self) -> None:
        found = self.still()
        train = found.loaders["train"]
        for stage in ("val", "test"):
            shared = _shared_indices(found, stage)
            if shared:
                noun = NOUNS[stage]
                names = [train.name(train.indices.index(index)) for index in sorted(shared)]
                fail(
                    f"{counted(len(shared), noun)} are training samples too. Their indices are in "
                    f"both loaders: {shown(names)}.\nThe {noun} metrics are those of samples that "
                    "the network has seen.",
                    f"the split in {self.data_name()}.setup.",
                )
        if not any(_has_same_storage(found, stage) for stage in ("val", "test")):
            pytest.skip("The loaders have no common Dataset, so indices cannot be compared.")

    def test_the_split_is_always_the_same(self) -> None:
        found, again = self.still(), self.still_again()
        if "val" not in found.loaders:
            pytest.skip("There are no validation samples.")
        where = f"the split in {self.data_name()}.setup. Its random numbers must use self.seed."
        cause = f"{where} It depends on the time, or on the state of a random generator."
        trained, held_out = found.inputs("train"), found.inputs("val")
        for number in range(1, len(found.passes["val"])):
            when = "in another epoch, or after another call of setup()"
            self._refuse_moved(found, trained, found.inputs("val", number), when, cause)
        self._refuse_moved(found, found.inputs("train", 1), held_out, "in the next epoch", cause)
        when = "by a new data module with the same seed, as by a resumed run"
        self._refuse_moved(found, trained, again.inputs("val"), when, cause)
        before, now = (reading.loaders["val"].indices for reading in (found, again))
        moved = set(now) - set(before)
        if moved:
            fail(f"{counted(len(moved), 'validation')} have other indices {when}.", cause)
        cause = f"{where} It depends on the process."
        for processes in self.processes:
            if processes == 1:
                continue
            when = f"with {processes} processes"
            ranks = self.of_ranks(processes)[0]
            self._refuse_moved(found, trained, inputs_over(ranks, "val"), when, cause)
            self._refuse_moved(found, inputs_over(ranks, "train"), held_out, when, cause)

    def _refuse_moved(
        self,
        found: Reading,
        trained: Counter[int],
        held_out: Counter[int],
        when: str,
        where: str,
    ) -> None:
        """Refuse inputs that are trained on and held out, unless they are so in each pass."""
        train, val = found.inputs("train"), found.inputs("val")
        moved = (trained.keys() & held_out.keys()) - (train.keys() & val.keys())
        if not moved:
            return
        names = found.loaders["train"].names_of(moved, "inputs")
        names = names or found.loaders["val"].names_of(moved, "inputs")
        fail(
            f"The split changes: {counted(len(moved), 'validation')} and training samples change "
            f"places {when}.\nSamples {shown(names)} are trained on and held out.",
            where,
        )

    def test_few_samples_of_the_evaluation_are_identical_with_training_samples(self) -> None:
        found = self.still()
        trained = found.inputs("train")
        if len(trained) == 1 and trained.total() > 1:
            fail(
                f"All {trained.total():,} training samples have the same input.",
                "how inputs are read and converted. For example, a division by 255 before a "
                "conversion to integers makes all pixels 0.",
            )
        for stage in ("val", "test"):
            copies = _copies(found, stage)
            if not copies:
                continue
            noun, number = NOUNS[stage], len(found.samples(stage))
            lines = [
                f"{counted(len(copies), noun)} of {number:,} ({len(copies) / number:.1%}) have the "
                "same input as a training sample.",
                *copies[:3],
            ]
            if len(copies) > MAX_IDENTICAL * number:
                fail(
                    "\n".join(lines)
                    + f"\nAt most {MAX_IDENTICAL:.0%} are allowed: {noun} metrics are too good.",
                    "the function that returns the data. Does it repeat samples (oversampling, "
                    "files that exist twice), or return the same ones for training and test? "
                    "--model.class_weights balanced needs no copies of rare classes.",
                )
            warnings.warn("\n".join(lines), stacklevel=1)


def _copies(found: Reading, stage: str) -> list[str]:
    """Return the samples of a stage with the input of another sample in training, in words."""
    if stage not in found.loaders:
        return []
    train, loader = found.loaders["train"], found.loaders[stage]
    trained, shared = found.inputs("train"), _shared_indices(found, stage)
    lines = []
    for position, sample in enumerate(found.samples(stage)):
        is_shared = shared and loader.indices[position] in shared
        if sample.inputs in trained and not is_shared:
            names = train.names_of([sample.inputs], "inputs")
            of_train = f" = sample {shown(names)} (training)" if names else ""
            lines.append(f"  sample {loader.name(position)} ({NOUNS[stage]}){of_train}")
    return lines


def _has_same_storage(found: Reading, stage: str) -> bool:
    """Return whether indices of a stage and of training are those of the same samples."""
    train, other = found.loaders["train"], found.loaders.get(stage)
    return bool(other and train.indices and other.indices and train.storage == other.storage)


def _shared_indices(found: Reading, stage: str) -> set[int]:
    """Return the indices of samples that are both in training and in another stage."""
    if not _has_same_storage(found, stage):
        return set()
    return set(found.loaders["train"].indices) & set(found.loaders[stage].indices)
