"""The test that loaders return each sample once in an epoch, over all processes."""

from collections import Counter

import pytest

from bn_lightning.testing.data.base import NOUNS, LoaderTests, identity_in
from bn_lightning.testing.data.contents import Sample, identified
from bn_lightning.testing.data.loaders import Loader
from bn_lightning.testing.data.reading import Reading
from bn_lightning.testing.failures import counted, fail, shown


class CompletenessTests(LoaderTests):
    """Each sample is read once in an epoch."""

    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_each_sample_is_read_exactly_once_in_an_epoch(self, processes: int) -> None:
        if processes not in self.processes:
            pytest.skip(f"The project does not train with {processes} processes.")
        alone = self.still()
        ranks = [alone] if processes == 1 else self.of_ranks(processes)[0]
        stages = [stage for stage, loader in alone.loaders.items() if not loader.replaces]
        if not stages:
            pytest.skip("All samplers draw samples with replacement.")
        for stage in stages:
            self._refuse_other_samples(alone, ranks, stage)

    def _refuse_other_samples(self, alone: Reading, ranks: list[Reading], stage: str) -> None:
        loader, what = alone.loaders[stage], identity_in(alone, stage)
        expected = loader.samples or alone.samples(stage)
        read = [sample for rank in ranks for sample in rank.samples(stage)]
        # Samples without an identity are only counted.
        wanted = Counter(identified(expected, what) if what else [None] * len(expected))
        found = Counter(identified(read, what) if what else [None] * len(read))
        missing, extra = wanted - found, found - wanted
        if not missing and not extra:
            return
        noun = NOUNS[stage]
        lines = [
            f"With {len(ranks)} process{'es' * (len(ranks) > 1)}, {counted(len(expected), noun)} "
            f"should be read once each in an epoch, but {extra.total():,} are read too often and "
            f"{missing.total():,} are not read."
        ]
        for verb, values in (("Too often", extra), ("Not read", missing)):
            names = loader.names_of(values, what) if what else []
            if names:
                lines.append(f"{verb}: {noun} samples {shown(names)}.")
        fail("\n".join(lines), self._cause_of_count(loader, stage, len(ranks), read, expected))

    def _cause_of_count(
        self, loader: Loader, stage: str, processes: int, read: list[Sample], expected: list[Sample]
    ) -> str:
        where = f"{self.data_name()}.{stage}_dataloader"
        if loader.drops_last:
            return f"{where}. Its DataLoader has drop_last=True."
        if processes > 1 and len(read) >= processes * len(expected):
            return (
                f"{where}. Each process reads all samples. bn_lightning's loaders need "
                "`trainer=self.trainer`, or are made by self.batches and self.train_batches."
            )
        if processes > 1 and len(read) <= len(expected) * 2 // 3:
            return (
                f"{self.data_name()}.setup and {where}. Each process seems to read a part of its "
                "own part. Loaders of bn_lightning and Lightning's sampler divide the samples "
                "among the processes, so do not divide them yourself."
            )
        if processes > 1 and not loader.is_exact and 0 < len(read) - len(expected) < processes:
            return (
                f"{where}. PyTorch's DistributedSampler repeats samples so that each process has "
                "the same number. bn_lightning.ExactDataLoader does not."
            )
        return f"{where}, and its sampler."
