"""What is read: a plan of passes over the loaders, and the record of what they return."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bn_lightning.testing.data.contents import Batch, Sample
from bn_lightning.testing.data.loaders import Loader
from bn_lightning.testing.data.source import Source

STAGES = ("train", "val", "test", "predict")
# Samples whose values are kept, and samples that are augmented in two orders.
NUM_KEPT = 256


@dataclass(frozen=True)
class Plan:
    """Which passes are made.

    Attributes:
        source: the data module.
        epochs: the epochs of training, in order and without a gap.
        still: without augmentation; otherwise only the training samples are read.
        workers: worker processes of each loader.
        processes: number of processes (ranks).
        disturbed: whether the global generators are in another state, and `setup` is
            called once more.
    """

    source: Source
    epochs: tuple[int, ...] = (0,)
    still: bool = True
    workers: int = 0
    processes: int = 1
    disturbed: bool = False


@dataclass
class Reading:
    """What was read on one rank.

    Attributes:
        passes: the passes of each stage, each a list of batches.
        loaders: facts about the loader of each stage.
        stated: the attributes of the data module that the task needs, by name.
        classes: names of the classes.
        identity, class_counts: what the data module returns.
        first: the first batch of training.
        tested, predicted: the inputs of the first test samples, from two loaders.
        forwards, backwards: digests of the same augmented samples, read in two orders.
    """

    passes: dict[str, list[list[Batch]]] = field(default_factory=lambda: {s: [] for s in STAGES})
    loaders: dict[str, Loader] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    classes: list[Any] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    class_counts: list[int] | None = None
    first: Any = None
    tested: list[Tensor] = field(default_factory=list)
    predicted: list[Tensor] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    backwards: list[int] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of the first passes of training, validation and test."""
        for stage in ("train", "val", "test"):
            for batch in self.passes[stage][0] if self.passes[stage] else []:
                yield stage, batch

    def all_samples(self, stage: str) -> list[list[Sample]]:
        """Return the samples of each pass, in order."""
        passes = self.passes[stage]
        return [[sample for batch in batches for sample in batch.samples] for batches in passes]

    def samples(self, stage: str, number: int = 0) -> list[Sample]:
        """Return the samples of a pass, in order; empty if there was no such pass."""
        return self.all_samples(stage)[number] if self.passes[stage] else []

    def inputs(self, stage: str, number: int = 0) -> Counter[int]:
        """Return the inputs of a pass, and how often each of them was read."""
        return Counter(sample.inputs for sample in self.samples(stage, number))
