"""The base class of the tests of data: the passes over the loaders that they compare."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bn_lightning.errors import UserError
from bn_lightning.runs import experiment as experiments
from bn_lightning.testing.data import passes, ranks
from bn_lightning.testing.data.contents import identified
from bn_lightning.testing.data.reading import Plan, Reading
from bn_lightning.testing.data.source import Source, source_of
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.testing.failures import fail, shown

NOUNS = {"train": "training", "val": "validation", "test": "test", "predict": "predict"}
# At least this share of the samples that a loader returns must be known by their content.
KNOWN_SHARE = 0.9


class LoaderTests(ExperimentTests):
    """Base class of tests of data.

    Attributes:
        processes: the numbers of processes with which the project trains.
    """

    processes: ClassVar[tuple[int, ...]] = (1, 2, 3)
    _cannot_be_read: ClassVar[bool] = False

    @classmethod
    def source(cls) -> Source:
        """Return the data module of the experiment."""
        return source_of(cls, str(Path.cwd()))  # type: ignore[arg-type]

    @classmethod
    def reading(cls, **plan: Any) -> Reading:
        """Make the passes of a plan in this process; see `reading.Plan`."""
        try:
            return passes.read(Plan(cls.source(), **plan))
        except UserError as error:
            if cls._cannot_be_read:
                pytest.skip("The data cannot be read. The first failure says why.")
            cls._cannot_be_read = True
            fail(f"The data cannot be read: {error}", "`settings` of the test class.")

    @classmethod
    def still(cls) -> Reading:
        """Return two epochs without augmentation, and what is read in evaluation."""
        return cls.reading(epochs=(0, 1))

    @classmethod
    def still_again(cls) -> Reading:
        """Return the first epoch without augmentation of a second data module."""
        return cls.reading(disturbed=True)

    @classmethod
    def augmented(cls) -> Reading:
        """Return two epochs of training."""
        return cls.reading(epochs=(0, 1), still=False)

    @classmethod
    def of_ranks(cls, processes: int) -> tuple[list[Reading], list[Reading]]:
        """Return the first epoch, without and with augmentation, as each rank reads it."""
        source = cls.source()
        plans = tuple(Plan(source, processes=processes, still=still) for still in (True, False))
        try:
            found = ranks.read(plans)
        except ranks.RankFailed as error:
            fail(
                f"With {processes} processes, the data cannot be read: {error}",
                "the code that raises this error. If the project never trains with "
                f"{processes} processes, set `processes = (1,)` in the test class.",
            )
        still, augmented = zip(*found, strict=True)
        return list(still), list(augmented)

    @classmethod
    def data_name(cls) -> str:
        """Return the name of the class of the data module."""
        return experiments.load(cls.experiment).data.__name__


def identity_in(found: Reading, stage: str) -> str | None:
    """Return what identifies the samples of a stage, or None.

    It is their content, if the pass returns what the loader's Dataset contains. A random
    transform changes inputs, and a plain DataLoader cannot be told to leave it out.
    """
    samples, loader = found.samples(stage), found.loaders[stage]
    known = loader.samples or (found.samples(stage, 1) if stage == "train" else samples)
    for what in ("content", "inputs", "targets"):
        contained = set(identified(known, what))
        values = identified(samples, what)
        if sum(value in contained for value in values) >= KNOWN_SHARE * len(values):
            # A single value, such as that of missing targets, identifies no sample.
            return what if len(contained) > 1 else None
    return None


def likely_cause(found: Reading, stage: str) -> str:
    """Return a line about the random generators that the Dataset of a stage keeps, or nothing."""
    kept = found.loaders[stage].generators
    if not kept:
        return ""
    return (
        f"\nLikely cause: {shown(kept)}. Draw from the global generators of NumPy, torch and "
        "Python instead, such as numpy.random.normal()."
    )


def inputs_over(ranks: Iterable[Reading], stage: str) -> Counter[int]:
    """Return the inputs that several ranks have read together, and how often."""
    return sum((rank.inputs(stage) for rank in ranks), Counter())
