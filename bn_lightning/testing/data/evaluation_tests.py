"""Tests of validation and test samples: they are the same in each pass."""

from collections import Counter
from itertools import pairwise

import pytest

from bn_lightning.testing.data.base import NOUNS, LoaderTests, likely_cause
from bn_lightning.testing.data.contents import Sample, identified
from bn_lightning.testing.failures import counted, fail

Targets = dict[int, set[int]]


class EvaluationTests(LoaderTests):
    """An evaluation is not random, and no pass gives an input another target."""

    def test_evaluation_reads_the_same_samples_in_each_pass(self) -> None:
        found, again = self.still(), self.still_again()
        trained = found.inputs("train")
        for stage in ("val", "test"):
            passes = found.all_samples(stage) + again.all_samples(stage)
            for one, other in pairwise(passes):
                self._refuse_other_pass(stage, one, other, trained, likely_cause(found, stage))

    def _refuse_other_pass(
        self, stage: str, one: list[Sample], other: list[Sample], trained: Counter[int], cause: str
    ) -> None:
        if one == other:
            return
        noun, where = NOUNS[stage], f"{self.data_name()}.{stage}_dataloader"
        if Counter(one) == Counter(other):
            fail(
                f"The {noun} samples are shuffled: their order differs between two passes. "
                "`predict` and the tables of a test rely on their order.",
                f"{where}.",
            )
        new = [sample for sample in other if sample not in set(one)]
        if any(sample.inputs in trained for sample in new):
            pytest.skip("The split changes. The test of the split reports it.")
        if Counter(identified(one, "inputs")) == Counter(identified(other, "inputs")):
            pytest.skip("The targets change. The test of the targets reports it.")
        fail(
            f"{counted(len(new), noun)} of {len(other):,} differ when they are read a second time. "
            f"Evaluation must not be random: networks would be compared on other inputs.{cause}",
            f"random transforms in {where} and its Dataset.",
        )

    def test_each_input_keeps_its_target(self) -> None:
        found, again = self.still(), self.still_again()
        for stage in ("train", "val", "test"):
            passes = map(_targets_in, found.all_samples(stage) + again.all_samples(stage))
            first = next(passes, {})
            for targets in passes:
                both = first.keys() & targets.keys()
                count = sum(first[inputs] != targets[inputs] for inputs in both)
                if count:
                    fail(
                        f"{counted(count, NOUNS[stage])} have another target in another pass, "
                        "although their input is the same.",
                        f"{self.data_name()}.{stage}_dataloader and the Dataset. Inputs and "
                        "targets are shuffled or indexed in different ways.",
                    )


def _targets_in(samples: list[Sample]) -> Targets:
    """Return the targets of each input."""
    targets: Targets = {}
    for sample in samples:
        targets.setdefault(sample.inputs, set()).add(sample.targets)
    return targets
