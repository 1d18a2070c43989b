"""Tests of the split: samples of the evaluation are not trained on."""

import warnings

import pytest

from bn_lightning.testing.contents import Sample
from bn_lightning.testing.loader_tests import NOUNS, LoaderTests, counted, fail, named, shown
from bn_lightning.testing.reading import Reading

# Share of the validation or test set that may be identical with training samples. Published data
# sets contain duplicates.
MAX_IDENTICAL = 0.01


class SplitTests(LoaderTests):
    """Held-out samples are never trained on, and the split is always the same."""

    def test_held_out_samples_are_never_trained_on(self) -> None:
        found = self.still()
        for stage in ("val", "test"):
            shared = _shared_indices(found, stage)
            if shared:
                train, noun = found.loaders["train"], NOUNS[stage]
                assert train.indices is not None
                names = [train.name(train.indices.index(index)) for index in sorted(shared)]
                fail(
                    f"{counted(len(shared), noun)} are training samples too. Their indices are in "
                    f"both loaders: {shown(names)}.\nThe {noun} metrics are those of samples that "
                    f"the network has seen. Look at the split in {self.data_name()}.setup."
                )
        if not _has_one_storage(found, "val") and not _has_one_storage(found, "test"):
            pytest.skip("The loaders have no common Dataset, so indices cannot be compared.")

    def test_the_split_is_always_the_same(self) -> None:
        found, again = self.still(), self.still_again()
        if "val" not in found.loaders:
            pytest.skip("There are no validation samples.")
        where = f"Look at the split in {self.data_name()}.setup and its seed: use self.seed only."
        cause = f"{where} It depends on the time, or on the state of a random generator."
        own = {sample.inputs for sample in found.samples("train")}
        for number in range(1, len(found.passes["val"])):
            when = "in another epoch, or after another call of setup()"
            self._refuse_moved(own, found, found.samples("val", number), when, cause)
        later = {sample.inputs for sample in found.samples("train", 1)}
        self._refuse_moved(later, found, found.samples("val"), "in the next epoch", cause)
        when = "by a new data module with the same seed, as by a resumed run"
        self._refuse_moved(own, found, again.samples("val"), when, cause)
        before, now = found.loaders["val"].indices, again.loaders["val"].indices
        if before is not None and now is not None and set(before) != set(now):
            count = len(set(now) - set(before))
            fail(f"{counted(count, 'validation')} have other indices {when}.\n{cause}")
        for processes in self.processes:
            if processes == 1:
                continue
            ranks = self.of_ranks(processes)[0]
            val = [sample for rank in ranks for sample in rank.samples("val")]
            trained = {sample.inputs for rank in ranks for sample in rank.samples("train")}
            cause = f"{where} It depends on the process."
            when = f"with {processes} processes"
            self._refuse_moved(own, found, val, when, cause)
            self._refuse_moved(trained, found, found.samples("val"), when, cause)

    def _refuse_moved(
        self, trained: set[int], found: Reading, val: list[Sample], when: str, where: str
    ) -> None:
        """Refuse validation samples that are training samples in another pass only."""
        __tracebackhide__ = True
        # These are identical samples in both parts.
        own = {sample.inputs for sample in found.samples("train")}
        both = own & {sample.inputs for sample in found.samples("val")}
        moved = {sample.inputs for sample in val if sample.inputs in trained - both}
        if not moved:
            return
        names = named(found.loaders["train"], moved, "inputs")
        names = names or named(found.loaders["val"], moved, "inputs")
        fail(
            f"The split changes: {counted(len(moved), 'validation')} and training samples change "
            f"places {when}.\nSamples {shown(names)} are trained on and held out. {where}"
        )

    def test_few_samples_of_the_evaluation_are_identical_with_training_samples(self) -> None:
        found = self.still()
        train = found.loaders["train"]
        trained = {sample.inputs for sample in found.samples("train")}
        for stage in ("val", "test"):
            loader = found.loaders.get(stage)
            if loader is None:
                continue
            samples = found.samples(stage)
            same = set(_shared_indices(found, stage))
            identical = [
                position
                for position, sample in enumerate(samples)
                if sample.inputs in trained
                and (loader.indices is None or not same or loader.indices[position] not in same)
            ]
            if not identical:
                continue
            noun = NOUNS[stage]
            lines = [
                f"{counted(len(identical), noun)} of {len(samples):,} "
                f"({len(identical) / len(samples):.1%}) have the same input as a training sample."
            ]
            for position in identical[:3]:
                copies = named(train, [samples[position].inputs], "inputs")
                of_train = f" = training sample {shown(copies)}" if copies else ""
                name = str(position) if loader.indices is None else loader.name(position)
                lines.append(f"  {noun} sample {name}{of_train}")
            if len(identical) > MAX_IDENTICAL * len(samples):
                fail(
                    "\n".join(lines)
                    + f"\nAt most {MAX_IDENTICAL:.0%} may be. The {noun} metrics are too good. "
                    f"Look at how the function of the data, or {self.data_name()}.setup, puts "
                    "samples into the parts: are there copies, or is a part contained in another?"
                )
            warnings.warn("\n".join(lines), stacklevel=1)
        if train.samples is None and not trained:
            pytest.skip("There are no training samples.")


def _has_one_storage(found: Reading, stage: str) -> bool:
    train, other = found.loaders["train"], found.loaders.get(stage)
    has_indices = other is not None and None not in (train.indices, other.indices)
    return has_indices and other is not None and train.storage == other.storage


def _shared_indices(found: Reading, stage: str) -> list[int]:
    if not _has_one_storage(found, stage):
        return []
    train, other = found.loaders["train"].indices, found.loaders[stage].indices
    assert train is not None and other is not None
    return sorted(set(train) & set(other))
