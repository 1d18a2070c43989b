"""Tests of loaders: each sample once, and the same samples whoever reads them."""

from collections import Counter
from collections.abc import Hashable
from itertools import pairwise

import pytest

from bn_lightning.testing.contents import Sample
from bn_lightning.testing.loader_tests import (
    NOUNS,
    LoaderTests,
    counted,
    fail,
    identified,
    identity_in,
    named,
    same_counts,
    shown,
)
from bn_lightning.testing.loaders import Loader
from bn_lightning.testing.reading import Reading

SEEDING = (
    "bn_lightning.ExactDataLoader seeds the global generators of torch, NumPy and Python for each "
    "sample: draw from these in the Dataset, and keep no generator."
)


class OrderTests(LoaderTests):
    """Each sample is read once per epoch, and depends only on (seed, epoch, sample)."""

    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_each_sample_is_read_exactly_once_in_an_epoch(self, processes: int) -> None:
        if processes not in self.processes:
            pytest.skip(f"The project does not train with {processes} processes.")
        alone = self.still()
        found = [alone] if processes == 1 else self.of_ranks(processes)[0]
        checked = 0
        for stage in ("train", "val", "test"):
            if stage in alone.loaders and not alone.loaders[stage].replaces:
                checked += 1
                self._refuse_other_samples(alone, found, stage)
        if not checked:
            pytest.skip("All samplers draw samples with replacement.")

    def _refuse_other_samples(self, alone: Reading, found: list[Reading], stage: str) -> None:
        __tracebackhide__ = True
        loader, what = alone.loaders[stage], identity_in(alone, stage)
        expected = alone.samples(stage) if loader.samples is None else loader.samples
        read = [sample for rank in found for sample in rank.samples(stage)]
        # Samples without an identity are only counted.
        wanted = identified(expected, what) if what else [None] * len(expected)
        values = identified(read, what) if what else [None] * len(read)
        missing, extra = Counter(wanted), Counter(values)
        missing.subtract(values)
        extra.subtract(wanted)
        never, again = +missing, +extra
        if not never and not again:
            return
        noun, processes = NOUNS[stage], len(found)
        lines = [
            f"With {processes} process{'es' * (processes > 1)}, {counted(len(expected), noun)} "
            f"should be read once each in an epoch, but {again.total():,} are read too often and "
            f"{never.total():,} are not read."
        ]
        for verb, values_of in (("Too often", again), ("Not read", never)):
            names = named(loader, values_of, what) if what else []
            if names:
                lines.append(f"{verb}: {noun} samples {shown(names)}.")
        fail("\n".join([*lines, self._cause_of_count(loader, stage, found, expected)]))

    def _cause_of_count(
        self, loader: Loader, stage: str, found: list[Reading], expected: list[Sample]
    ) -> str:
        where = f"{self.data_name()}.{stage}_dataloader"
        read, processes = sum(len(rank.samples(stage)) for rank in found), len(found)
        if loader.drops_last:
            return f"Look at {where}: its DataLoader has drop_last=True."
        if processes > 1 and read >= processes * len(expected):
            return (
                f"Look at {where}: each process reads all samples. bn_lightning's loaders "
                "need `trainer=self.trainer`, or are made by self.batches and self.train_batches."
            )
        if processes > 1 and read <= len(expected) * 2 // 3:
            return (
                f"Look at {self.data_name()}.setup and {where}: each process seems to read a part "
                "of its own part. The loaders of bn_lightning and Lightning's sampler take the "
                "part of a rank; do not split the data by rank yourself."
            )
        if processes > 1 and not loader.is_exact and 0 < read - len(expected) < processes:
            return (
                f"Look at {where}: PyTorch's DistributedSampler repeats samples so that each "
                "process has the same number. bn_lightning.ExactDataLoader does not."
            )
        return f"Look at the sampler, or the loader, in {where}."

    def test_training_samples_do_not_depend_on_the_number_of_workers(self) -> None:
        alone = self.augmented()
        loader = alone.loaders["train"]
        if not loader.has_workers:
            pytest.skip(f"A {loader.kind} has no worker processes.")
        found = self.reading(still=False, workers=2).samples("train")
        self._refuse_other_order(
            alone.samples("train"),
            found,
            "with 2 workers than with 0 workers, in the same epoch with the same seed",
            loader,
            "the worker",
        )

    def test_training_samples_depend_only_on_seed_and_epoch(self) -> None:
        alone = self.augmented()
        found = self.reading(epochs=(1,), still=False, disturbed=True).samples("train")
        self._refuse_other_order(
            alone.samples("train", 1),
            found,
            "when the second epoch is read again by a new data module, as by a resumed run",
            alone.loaders["train"],
            "what was read before, the time or the state of a generator",
        )

    def _refuse_other_order(
        self, before: list[Sample], now: list[Sample], when: str, loader: Loader, cause: str
    ) -> None:
        __tracebackhide__ = True
        if before == now:
            return
        where = f"{self.data_name()}.train_dataloader"
        if len(before) != len(now):
            fail(f"There are {len(now):,} instead of {len(before):,} training samples {when}.")
        pairs = list(zip(before, now, strict=True))
        if [s.targets for s in before] == [s.targets for s in now]:
            count = sum(one.inputs != other.inputs for one, other in pairs)
            kept = f"\nLikely cause: {shown(loader.generators)}." if loader.generators else ""
            fail(
                f"{counted(count, 'training')} of {len(now):,} are augmented in another way "
                f"{when}.\nThe random numbers of a transform depend on {cause}.{kept}\n{SEEDING} "
                f"Look at the Dataset and the transforms of {where}."
            )
        if same_counts(before, now):
            fail(
                f"The training samples are in another order {when}.\nThe order depends on "
                f"{cause}. Look at the sampler in {where}; the order of self.train_batches and "
                "of bn_lightning.ExactDataLoader(shuffle=True) is a function of seed and epoch."
            )
        count = len(set(before) - set(now))
        fail(
            f"{counted(count, 'training')} of {len(now):,} have other inputs or targets {when}.\n"
            f"They depend on {cause}. Look at {self.data_name()}.setup and at {where}."
        )

    def test_each_epoch_has_a_new_order_of_training_samples(self) -> None:
        found = self.still()
        what = identity_in(found, "train")
        if what is None or len(set(identified(found.samples("train"), what))) < 5:
            pytest.skip("There are too few different training samples to see their order.")
        first, second = (identified(found.samples("train", epoch), what) for epoch in (0, 1))
        if first == second:
            fail(
                "The training samples have the same order in each epoch. Look at "
                f"{self.data_name()}.train_dataloader: use self.train_batches, "
                "bn_lightning.ExactDataLoader(..., shuffle=True), or a sampler with set_epoch."
            )

    def test_the_augmentation_of_a_sample_does_not_depend_on_its_position_or_process(self) -> None:
        alone, plain = self.augmented(), self.still()
        advice = (
            "\nThe random numbers of a sample must be a function of (seed, epoch, sample). Draw "
            "them for the whole data set with bn_lightning.training.seeds.for_samples, and index "
            f"them by sample. Look at {self.data_name()}.augmentation."
        )
        moved = [i for i, pair in enumerate(_pairs(alone)) if pair[0] != pair[1]]
        if moved:
            fail(
                f"{len(moved):,} of {len(alone.forwards):,} training samples are augmented in "
                "another way if the samples are read in reverse order." + advice
            )
        samples = _inputs(alone, "train")
        if same_counts(samples, _inputs(plain, "train")):
            pytest.skip("The training samples are not augmented.")
        for processes in self.processes:
            if processes == 1:
                continue
            still, augmented = self.of_ranks(processes)
            read, raw = (
                [value for rank in found for value in _inputs(rank, "train")]
                for found in (augmented, still)
            )
            # Missing samples are found by another test.
            if not same_counts(raw, _inputs(plain, "train")):
                continue
            count = (Counter(samples) - Counter(read)).total()
            if count:
                fail(
                    f"{count:,} of {len(samples):,} training samples are augmented in another way "
                    f"by {processes} processes." + advice
                )

    def test_evaluation_reads_the_same_samples_in_each_pass(self) -> None:
        found, again = self.still(), self.still_again()
        trained = {sample.inputs for sample in found.samples("train")}
        for stage in ("val", "test"):
            passes = [
                reading.samples(stage, number)
                for reading in (found, again)
                for number in range(len(reading.passes[stage]))
            ]
            for one, other in pairwise(passes):
                self._refuse_other_pass(stage, one, other, trained)

    def _refuse_other_pass(
        self, stage: str, one: list[Sample], other: list[Sample], trained: set[int]
    ) -> None:
        __tracebackhide__ = True
        if one == other:
            return
        noun, where = NOUNS[stage], f"{self.data_name()}.{stage}_dataloader"
        if same_counts(one, other):
            fail(
                f"The {noun} samples are shuffled: their order differs between two passes. "
                f"`predict` and the tables of a test rely on their order. Look at {where}."
            )
        new = [sample for sample in other if sample not in set(one)]
        if any(sample.inputs in trained for sample in new):
            pytest.skip("The split changes. The test of the split reports it.")
        if same_counts(identified(one, "inputs"), identified(other, "inputs")):
            pytest.skip("The targets change. The test of the targets reports it.")
        fail(
            f"{counted(len(new), noun)} of {len(other):,} have other inputs in another pass. "
            "Evaluation must not be random: two networks would be compared on different inputs.\n"
            f"Look at {where}: is the augmentation of the training applied here too?"
        )

    def test_each_input_keeps_its_target(self) -> None:
        found, again = self.still(), self.still_again()
        first: dict[str, dict[int, set[Hashable]]] = {}
        for stage in ("train", "val", "test"):
            for reading in (found, again):
                for number in range(len(reading.passes[stage])):
                    samples = reading.samples(stage, number)
                    self._refuse_other_targets(stage, first, samples)

    def _refuse_other_targets(
        self, stage: str, first: dict[str, dict[int, set[Hashable]]], samples: list[Sample]
    ) -> None:
        __tracebackhide__ = True
        targets: dict[int, set[Hashable]] = {}
        for sample in samples:
            targets.setdefault(sample.inputs, set()).add(sample.targets)
        before = first.setdefault(stage, targets)
        count = sum(before[inputs] != targets[inputs] for inputs in before.keys() & targets.keys())
        if count:
            fail(
                f"{counted(count, NOUNS[stage])} have another target in another pass, although "
                "their input is the same. Inputs and targets are shuffled or indexed in different "
                f"ways.\nLook at {self.data_name()}.{stage}_dataloader, and at the Dataset."
            )


def _pairs(found: Reading) -> list[tuple[int, int]]:
    return list(zip(found.forwards, found.backwards, strict=True))


def _inputs(found: Reading, stage: str) -> list[int]:
    return [sample.inputs for sample in found.samples(stage)]
