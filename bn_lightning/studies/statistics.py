"""Statistics over runs: means with intervals, and differences paired by repetition."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from decimal import ROUND_CEILING, Context
from typing import Any, Literal

from scipy import stats

from bn_lightning.studies.repetitions import Repetition

# The columns of the CSV and JSON files that are not named like the fields of `Row`.
KEYS = {
    "metric": "figure",
    "variant": "choice",
    "baseline": "reference",
    "compared_by": "held_by",
}


@dataclass(frozen=True)
class Selection:
    """The validation metric that selects checkpoints, and its direction.

    Runs are compared by the same metric.

    Attributes:
        metric: name of the metric, such as `val_loss`.
        mode: "min" if lower values are better, "max" if higher values are better.
    """

    metric: str
    mode: Literal["min", "max"]

    @property
    def label(self) -> str:
        """The label of the metric in tables and plots: `val loss` for `val_loss`."""
        return self.metric.replace("_", " ")

    @property
    def test_metric(self) -> str:
        """The name of this metric on the test set: `test_loss` for `val_loss`."""
        return f"test_{self.metric.removeprefix('val_')}"

    @property
    def test_label(self) -> str:
        return self.test_metric.replace("_", " ")

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The direction of optimization, as Optuna names it."""
        return "maximize" if self.mode == "max" else "minimize"

    def has_reached(self, value: float, threshold: float) -> bool:
        """Return whether a value is at least as good as the threshold."""
        return value >= threshold if self.mode == "max" else value <= threshold

    def worst(self, values: Iterable[float]) -> float:
        return min(values) if self.mode == "max" else max(values)

    def rank(self, value: float | None) -> float:
        """Return a sort key that puts the best values first and missing values last."""
        if value is None or math.isnan(value):
            return math.inf
        return -value if self.mode == "max" else value


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        variant: name of the variant.
        repetition: seed, and fold if folds are varied.
        folder: folder of the run.
        failure: the reason if the run has no result, otherwise None.
        stale: how the current code differs from that of the run, or None.
        result: content of result.json.
        epochs: training metrics of each epoch.
        validations: the step and the metrics of each validation.
    """

    variant: str
    repetition: Repetition
    folder: str
    failure: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    stale: str | None = None

    def steps_to(self, threshold: float, selection: Selection) -> int | None:
        """Return the step of the first validation that reached the threshold, or None."""
        for metrics in self.validations:
            if selection.has_reached(metrics[selection.metric], threshold):
                return int(metrics["step"])
        return None


@dataclass(frozen=True)
class ReportedMetric:
    """A metric in the tables of a comparison.

    Attributes:
        name: name of the metric, and header of its table.
        value_of: returns the metric of a run, or None if the run does not have it.
        compared_by: whether runs are compared by their difference or by their ratio.
        digits: number of decimals in the table.
    """

    name: str
    value_of: Callable[[Run], float | None]
    compared_by: Literal["difference", "ratio"]
    digits: int


@dataclass(frozen=True)
class Row:
    """One metric over all runs of one variant.

    Intervals are 95% confidence intervals of the mean over repetitions, from Student's
    t distribution, as if the runs were independent. A variant is compared with its
    baseline by pairs of runs with the same seed, and the same fold if folds are varied.
    The mean ratio is the geometric mean of the ratios of the pairs. Its interval
    and effect size are computed from the logarithms of the ratios.

    Attributes:
        metric: name of the metric.
        variant: name of the variant.
        runs: number of runs of this variant.
        n: number of runs with this metric.
        failed: number of runs without a result.
        stale: number of runs of other code than the current one.
        mean, sd: mean and standard deviation over repetitions.
        low, high: lower and upper end of the interval of the mean.
        compared_by: "difference" or "ratio".
        baseline: the variant that this one is compared with.
        pairs: number of repetitions for which both variants have the metric.
        compared: mean difference from the baseline, or mean ratio to it.
        compared_low, compared_high: lower and upper end of the interval of `compared`.
        effect_size: Cohen's d of the pairs: the mean of their differences divided by
            the standard deviation of these differences.
    """

    metric: str
    variant: str
    runs: int
    n: int
    failed: int
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    compared_by: str
    baseline: str
    pairs: int
    compared: float | None
    compared_low: float | None
    compared_high: float | None
    effect_size: float | None
    stale: int = 0

    def as_data(self) -> dict[str, Any]:
        """Return the row with the column names of table.csv and table.json.

        Stale runs are listed in runs.csv.
        """
        names = (field.name for field in fields(self) if field.name != "stale")
        return {KEYS.get(name, name): getattr(self, name) for name in names}


def validated_on_test_set(runs: Iterable[Run]) -> bool:
    """Return whether any run used the test set for validation."""
    return any(run.result.get("val_images_from") == "test set" for run in runs)


def default_threshold(runs: Iterable[Run], selection: Selection) -> float | None:
    """Return a threshold that every variant reaches, on average over its runs.

    The threshold is the final value of the worst variant, rounded to a value that this
    variant reaches too. If higher values are better, as for accuracy, it is rounded
    down to a multiple of 0.005. If lower values are better, it is rounded up to two
    significant digits. Return None if there is no such threshold.
    """
    finals: dict[str, list[float]] = {}
    for run in runs:
        if run.validations:
            finals.setdefault(run.variant, []).append(run.validations[-1][selection.metric])
    means = list(map(statistics.fmean, finals.values()))
    if not means or not all(map(math.isfinite, means)):
        return None
    worst = selection.worst(means)
    if selection.mode == "max":
        return math.floor(worst * 200) / 200 or None
    # Accuracy is at most 1, but a loss or an error may have any scale.
    two_digits = Context(prec=2, rounding=ROUND_CEILING)
    return float(two_digits.create_decimal(repr(worst)))


def reported_metrics(
    runs: Iterable[Run], selection: Selection, threshold: float | None
) -> list[ReportedMetric]:
    """Return the metrics to report, in the order of their tables.

    They are the training loss, the validation and test metrics, the number of steps to
    the threshold if there is one, and the speed.
    """
    names = {
        "train_loss": "train loss",
        selection.metric: selection.label,
        selection.test_metric: selection.test_label,
    }
    if validated_on_test_set(runs):
        # The validation metric equals the test metric, and no checkpoint was selected.
        # The metric of the last epoch is noisy, so the best epoch and the mean of the
        # last three validations are reported too.
        del names[selection.metric]
        names |= {
            f"{selection.metric}_best": f"{selection.test_label}, best epoch",
            f"{selection.metric}_mean_of_last_3": f"{selection.test_label}, mean of last 3",
        }
    found = [
        ReportedMetric(label, _from_result(name), "difference", 4)
        for name, label in names.items()
        if any(run.result.get(name) is not None for run in runs)
    ]
    if threshold is not None:
        found.append(
            ReportedMetric(
                steps_to(threshold), lambda run: run.steps_to(threshold, selection), "ratio", 0
            )
        )
    speed = ReportedMetric("samples per second", _from_result("images_per_second"), "ratio", 0)
    return [*found, speed]


def steps_to(threshold: float) -> str:
    """Return the name of the metric that counts the steps to a threshold."""
    return f"steps to {_format_number(threshold)}"


def _from_result(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.result.get(name)


def _format_number(value: float) -> str:
    """Format a number with 3 decimals, or a very small or large one with 6 digits."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 1_000 or value == 0 else f"{value:g}"


def rows(
    runs: Sequence[Run], metrics: Iterable[ReportedMetric], baselines: Mapping[str, str]
) -> list[Row]:
    """Return a row for each metric and variant.

    Args:
        baselines: for each variant, the name of the variant that it is compared with.
    """
    return [_row(runs, metric, *pair) for metric in metrics for pair in baselines.items()]


def _row(runs: Sequence[Run], metric: ReportedMetric, variant: str, baseline: str) -> Row:
    own_runs = [run for run in runs if run.variant == variant]
    own = _by_repetition(own_runs, metric)
    others: dict[Repetition, float] = {}
    if variant != baseline:
        others = _by_repetition([run for run in runs if run.variant == baseline], metric)
    pairs = [(value, others[key]) for key, value in own.items() if key in others]
    compared, compared_low, compared_high, effect_size = _compare(pairs, metric.compared_by)
    mean, sd, low, high = mean_and_interval(list(own.values()))
    return Row(
        metric=metric.name,
        variant=variant,
        runs=len(own_runs),
        n=len(own),
        failed=sum(run.failure is not None for run in own_runs),
        mean=mean,
        sd=sd,
        low=low,
        high=high,
        compared_by=metric.compared_by,
        baseline=baseline,
        pairs=len(pairs),
        compared=compared,
        compared_low=compared_low,
        compared_high=compared_high,
        effect_size=effect_size,
        stale=sum(run.stale is not None for run in own_runs),
    )


def _by_repetition(runs: Iterable[Run], metric: ReportedMetric) -> dict[Repetition, float]:
    values = {run.repetition: metric.value_of(run) for run in runs if run.failure is None}
    return {key: float(value) for key, value in values.items() if value is not None}


def _compare(
    pairs: Iterable[tuple[float, float]], by: Literal["difference", "ratio"]
) -> tuple[float | None, float | None, float | None, float | None]:
    """Compare the values of pairs; see `Row`.

    Returns:
        The mean difference or ratio, the lower and upper end of its interval, and the
        effect size.
    """
    if by == "difference":
        mean, sd, *ends = mean_and_interval([a - b for a, b in pairs])
        found = [mean, *ends]
    else:
        mean, sd, *ends = mean_and_interval([math.log(a / b) for a, b in pairs])
        found = [None if value is None else math.exp(value) for value in (mean, *ends)]
    effect_size = mean / sd if mean is not None and sd else None
    return found[0], found[1], found[2], effect_size


def mean_and_interval(
    values: Sequence[float],
) -> tuple[float | None, float | None, float | None, float | None]:
    """Return statistics of values. With fewer than two values, the last three are None.

    Returns:
        The mean, the standard deviation, and the lower and upper end of the 95%
        confidence interval of the mean.
    """
    if len(values) < 2:
        return (values[0] if values else None), None, None, None
    mean, sd = statistics.mean(values), statistics.stdev(values)
    half_width = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, sd, mean - half_width, mean + half_width
