"""Tests of the order and the augmentation of training samples."""

from collections import Counter

import pytest

from bn_lightning.testing.data.base import LoaderTests, identity_in, inputs_over, likely_cause
from bn_lightning.testing.data.contents import Sample, identified
from bn_lightning.testing.data.reading import Reading
from bn_lightning.testing.failures import counted, fail


class OrderTests(LoaderTests):
    """Order and augmentation are a function of (seed, epoch, sample)."""

    def test_training_samples_do_not_depend_on_the_number_of_workers(self) -> None:
        alone = self.augmented()
        if not alone.loaders["train"].has_workers:
            pytest.skip("The training loader has no worker processes.")
        self._refuse_other_order(
            alone,
            alone.samples("train"),
            self.reading(still=False, workers=2).samples("train"),
            "with 2 workers and with 0 workers, in the same epoch with the same seed",
            "the worker",
        )

    def test_training_samples_depend_only_on_seed_and_epoch(self) -> None:
        alone = self.augmented()
        self._refuse_other_order(
            alone,
            alone.samples("train", 1),
            self.reading(epochs=(1,), still=False, disturbed=True).samples("train"),
            "when a new data module reads the second epoch again, as a resumed run does",
            "earlier reads, on the time, or on a generator that is kept",
        )

    def _refuse_other_order(
        self, alone: Reading, before: list[Sample], now: list[Sample], when: str, cause: str
    ) -> None:
        if before == now:
            return
        where = f"{self.data_name()}.train_dataloader"
        if len(before) != len(now):
            fail(
                f"There are {len(now):,} instead of {len(before):,} training samples {when}.",
                f"{where}. An IterableDataset must divide its samples among the workers.",
            )
        if [sample.targets for sample in before] == [sample.targets for sample in now]:
            pairs = zip(before, now, strict=True)
            count = sum(one.inputs != other.inputs for one, other in pairs)
            fail(
                f"{counted(count, 'training')} of {len(now):,} differ {when}.\nTheir random "
                f"numbers depend on {cause}.{likely_cause(alone, 'train')}",
                f"the Dataset and the transforms of {where}. bn_lightning.ExactDataLoader seeds "
                "the global generators for each sample.",
            )
        if Counter(before) == Counter(now):
            fail(
                f"The training samples are in another order {when}.\nThe order depends on {cause}.",
                f"the sampler in {where}. The order of self.train_batches and of "
                "bn_lightning.ExactDataLoader(shuffle=True) is a function of seed and epoch.",
            )
        count = len(set(before) - set(now))
        fail(
            f"{counted(count, 'training')} of {len(now):,} have other inputs or targets {when}.\n"
            f"They depend on {cause}.",
            f"{self.data_name()}.setup and {where}.",
        )

    def test_each_epoch_has_a_new_order_of_training_samples(self) -> None:
        found = self.still()
        what = identity_in(found, "train")
        if what is None or len(set(identified(found.samples("train"), what))) < 5:
            pytest.skip("There are too few different training samples to see their order.")
        first, second = (identified(found.samples("train", epoch), what) for epoch in (0, 1))
        if first == second:
            fail(
                "The training samples have the same order in each epoch.",
                f"{self.data_name()}.train_dataloader. Use self.train_batches, "
                "bn_lightning.ExactDataLoader(..., shuffle=True), or a sampler with set_epoch().",
            )

    def test_the_augmentation_of_a_sample_does_not_depend_on_its_position_or_process(self) -> None:
        alone, raw = self.augmented(), self.still()
        cause = likely_cause(alone, "train")
        where = (
            f"{self.data_name()}.augmentation. Its random numbers must be a function of (seed, "
            "epoch, sample). Draw them for all samples at once, with "
            "bn_lightning.training.seeds.for_samples, and index them by sample."
        )
        if cause:
            where = "the Dataset and its transforms."
        pairs = zip(alone.forwards, alone.backwards, strict=True)
        moved = sum(one != other for one, other in pairs)
        if moved:
            fail(
                f"{moved:,} of {len(alone.forwards):,} training samples differ if they are read in "
                f"reverse order.{cause}",
                where,
            )
        samples, raw_samples = alone.inputs("train"), raw.inputs("train")
        if samples == raw_samples:
            pytest.skip("The training samples are not augmented.")
        for processes in self.processes:
            if processes == 1:
                continue
            still, augmented = self.of_ranks(processes)
            # Another test reports missing samples.
            if inputs_over(still, "train") != raw_samples:
                continue
            changed = (samples - inputs_over(augmented, "train")).total()
            if changed:
                fail(
                    f"{changed:,} of {samples.total():,} training samples differ if {processes} "
                    f"processes read them.{cause}",
                    where,
                )
