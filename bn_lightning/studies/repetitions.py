"""The repetitions of a comparison: seeds, and settings such as the fold of cross-validation.

Every variant is trained once per repetition, and variants are compared in pairs of runs
of the same repetition.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bn_lightning.training.data_module import DataModule

# The name and value of each varied setting.
Point = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Repetition:
    """What distinguishes the runs of one variant.

    Attributes:
        seed: seed of the run.
        settings: the varied settings that are repetitions, and their values.
    """

    seed: int
    settings: Point = ()

    def __str__(self) -> str:
        """Return a title such as `seed 0` or `seed 0, fold 1`."""
        return ", ".join(f"{_short(name)} {value}" for name, value in self._all)

    @property
    def folder(self) -> str:
        """The folder of the runs within that of their variant: `seed-0` or `seed-0/fold-1`."""
        return "/".join(f"{_short(name)}-{value}" for name, value in self._all)

    @property
    def flags(self) -> list[str]:
        """The settings as flags of `fit`, without the seed."""
        return [text for name, value in self.settings for text in (f"--{name}", value)]

    @property
    def _all(self) -> Point:
        return (("seed", str(self.seed)), *self.settings)


def declared_by(data: type[DataModule]) -> list[str]:
    """Return the settings that a data module declares as repetitions, such as `data.fold`."""
    return [f"data.{name}" for name in data.repetitions]


def product(seeds: int, settings: Mapping[str, Sequence[str]]) -> list[Repetition]:
    """Return a repetition for each seed and each combination of values of the settings."""
    points = [
        tuple(zip(settings, values, strict=True))
        for values in itertools.product(*settings.values())
    ]
    return [Repetition(seed, point) for seed in range(seeds) for point in points]


def count(repetitions: Iterable[Repetition]) -> str:
    """Return the number of repetitions in words: `3 seeds`, `5 folds`, `3 seeds and 5 folds`."""
    values: dict[str, set[str]] = {}
    for repetition in repetitions:
        for name, value in repetition._all:
            values.setdefault(_short(name), set()).add(value)
    # Several folds with a single seed are counted as folds.
    counts = {name: len(found) for name, found in values.items() if len(found) > 1}
    counts = counts or {list(values)[-1]: 1}
    return " and ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items())


def _short(name: str) -> str:
    return name.rpartition(".")[2]
