"""What many runs say together: means with intervals, and differences paired by seed."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scipy import stats


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        choice, seed: what it is a run of.
        folder: where all about it lies.
        failure: why it has no result; None for one that has.
        result: its result.json.
        epochs: the train figures of each epoch.
        validations: step and figures of each validation.
    """

    choice: str
    seed: int
    folder: str
    failure: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)

    def steps_to(self, accuracy: float) -> int | None:
        """The step of the first validation with at least that accuracy; None where there is none."""
        return next((int(figures["step"]) for figures in self.validations if figures["val_acc"] >= accuracy), None)


@dataclass(frozen=True)
class Figure:
    """A figure of a run, and how two runs are held to each other: by their difference or their ratio."""

    name: str
    of: Callable[[Run], float | None]
    held_by: Literal["difference", "ratio"]
    digits: int


@dataclass(frozen=True)
class Row:
    """A figure of all runs of one choice.

    Intervals are of 95%, by Student's t, for the mean over seeds. A ratio is the geometric mean of those of all pairs,
    its interval that of the mean of their logarithms. The effect size is Cohen's d of the pairs: the mean of their
    differences (or logarithms of ratios) over the standard deviation of these.

    Attributes:
        runs: of this choice; n: those with this figure; failed: those without a result.
        reference: the choice that this one is held to.
        pairs: seeds of which both have the figure.
        compared: the mean difference to the reference, or the ratio.
    """

    figure: str
    choice: str
    runs: int
    n: int
    failed: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    held_by: str
    reference: str
    pairs: int
    compared: float | None
    compared_low: float | None
    compared_high: float | None
    effect_size: float | None


def validated_on_test_set(runs: Iterable[Run]) -> bool:
    return any(run.result.get("val_images_from") == "test set" for run in runs)


def figures(runs: Iterable[Run], accuracy: float | None) -> list[Figure]:
    """What a table shows: losses and accuracies, steps to that validation accuracy, and the speed."""
    shown = {"train_loss": "train loss", "val_acc": "val acc", "test_acc": "test acc"}
    if validated_on_test_set(runs):
        del shown["val_acc"]  # the same; and where nothing was selected, the last epoch is one among others
        shown |= {"val_acc_best": "test acc, best epoch", "val_acc_mean_of_last_3": "test acc, mean of last 3"}

    def of(name: str) -> Callable[[Run], float | None]:
        return lambda run: run.result.get(name)

    found = [
        Figure(said, of(name), "difference", 4)
        for name, said in shown.items()
        if any(run.result.get(name) is not None for run in runs)
    ]
    if accuracy is not None:
        found.append(Figure(f"steps to {accuracy:.3f}", lambda run: run.steps_to(accuracy), "ratio", 0))
    return [*found, Figure("images per second", of("images_per_second"), "ratio", 0)]


def rows(runs: Sequence[Run], shown: Iterable[Figure], references: Mapping[str, str]) -> list[Row]:
    """A row for each figure and choice: of a choice, the one that it is held to."""
    return [_row(runs, figure, *pair) for figure in shown for pair in references.items()]


def _row(runs: Sequence[Run], figure: Figure, choice: str, reference: str) -> Row:
    def by_seed(choice: str) -> dict[int, float]:
        values = {run.seed: figure.of(run) for run in runs if run.choice == choice and run.failure is None}
        return {seed: float(value) for seed, value in values.items() if value is not None}

    mine, others = by_seed(choice), by_seed(reference) if choice != reference else {}
    mean, sd, low, high = mean_and_interval(list(mine.values()))
    pairs = [(mine[seed], others[seed]) for seed in sorted(mine.keys() & others.keys())]
    is_ratio = figure.held_by == "ratio"
    differences = [math.log(a / b) if is_ratio else a - b for a, b in pairs]
    center, spread, *ends = mean_and_interval(differences)
    compared = [None if value is None else math.exp(value) if is_ratio else value for value in (center, *ends)]
    return Row(
        figure=figure.name,
        choice=choice,
        runs=sum(run.choice == choice for run in runs),
        n=len(mine),
        failed=sum(run.failure is not None for run in runs if run.choice == choice),
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        held_by=figure.held_by,
        reference=reference,
        pairs=len(pairs),
        compared=compared[0],
        compared_low=compared[1],
        compared_high=compared[2],
        effect_size=center / spread if center is not None and spread else None,
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None, float | None]:
    """Mean, standard deviation and 95% interval of the mean; of one value no more than itself."""
    if len(values) < 2:
        return (values[0] if values else None), None, None, None
    mean, sd = statistics.mean(values), statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, mean - half, mean + half


def cells(row: Row, digits: int) -> list[str]:
    """A row as a person reads it, under `columns`."""

    def number(value: float | None, sign: str = "", digits: int = digits) -> str:
        return "" if value is None else f"{value:{sign}z,.{digits}f}"

    def interval(low: float | None, high: float | None, sign: str = "", digits: int = digits) -> str:
        return "" if low is None else f"{number(low, sign, digits)} to {number(high, sign, digits)}"

    how: dict[str, Any] = {"sign": "+"} if row.held_by == "difference" else {"digits": 2}
    compared = number(row.compared, **how) + (" times" if row.held_by == "ratio" and row.pairs else "")
    if row.compared_low is not None:
        compared += f" ({interval(row.compared_low, row.compared_high, **how)})"
    return [
        row.choice,
        str(row.n) if row.n == row.runs else f"{row.n} of {row.runs}",
        number(row.mean) + ("" if row.sd is None else f" ± {number(row.sd)}"),
        interval(row.low, row.high),
        compared,
        number(row.effect_size, "+", 1),
    ]


def columns(figure: str, references: Collection[str]) -> list[str]:
    """The heads of `cells`. Where there are several references they have their first word in common, the norm."""
    to = min(references)
    return [figure, "n", "mean ± sd", "95% interval", f"to {to.split()[0] if len(references) > 1 else to} (95%)", "d"]


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table for a README."""
    head = [heads, ["---"] * len(heads)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [*head, *lines])


def as_csv(lines: Sequence[dict[str, Any]]) -> str:
    """Without rounding."""
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
