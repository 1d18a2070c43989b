"""Plots of `compare`: learning curves with bands, and the test metric against a setting."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bn_lightning.studies import repetitions
from bn_lightning.studies.statistics import (
    Run,
    Selection,
    mean_and_interval,
    validated_on_test_set,
)
from bn_lightning.studies.variants import Variant

# A legend beside the axes covers no curve.
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}

# The points of one line in a plot: values of a setting, each with the runs that have
# this value.
Points = list[tuple[float, list[Run]]]


def learning_curves(runs: Sequence[Run], selection: Selection, path: Path) -> None:
    """Plot the training loss against the epoch, and the validation metric against the step.

    Lines are means over seeds and folds. Bands extend from the minimum to the maximum.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, variant in enumerate(dict.fromkeys(run.variant for run in runs)):
        done = [run for run in runs if run.variant == variant and run.failure is None]
        losses = [
            [(epoch, metrics["train_loss"]) for epoch, metrics in enumerate(run.epochs, 1)]
            for run in done
        ]
        _band(left, losses, variant, color)
        values = [
            [(metrics["step"], metrics[selection.metric]) for metrics in run.validations]
            for run in done
        ]
        _band(right, values, variant, color)
    on_test_set = validated_on_test_set(runs)
    # An axis of few epochs would have ticks such as 1.25.
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set(xlabel="epoch", ylabel="train loss")
    right.set(xlabel="step", ylabel=selection.test_label if on_test_set else selection.label)
    over = repetitions.count(run.repetition for run in runs)
    right.legend(title=f"mean over {over}\n(band: min to max)", **BESIDE)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _band(
    axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], label: str, color: int
) -> None:
    positions = [x for x, _ in max(curves, key=len, default=[])]
    # The values of all curves at each position. Curves may have different lengths.
    values = [[curve[i][1] for curve in curves if i < len(curve)] for i in range(len(positions))]
    means = list(map(statistics.fmean, values))
    lows, highs = list(map(min, values)), list(map(max, values))
    hue = f"C{color % 10}"
    # A line through a single point would be invisible.
    marker = "o" if len(positions) == 1 else None
    axes.plot(positions, means, label=label, color=hue, marker=marker)
    axes.fill_between(positions, lows, highs, color=hue, alpha=0.15, linewidth=0)


def numeric_settings(
    runs: Iterable[Run], variants: Sequence[Variant]
) -> dict[str, dict[str, Points]]:
    """Return the lines of a plot for each setting with several numeric values.

    There is one line per combination of the other settings, which are its label. A line
    has one point per value of the setting.
    """
    found: dict[str, dict[str, Points]] = {}
    for name in dict.fromkeys(key for variant in variants for key, _ in variant.settings):
        values = [dict(variant.settings).get(name, "") for variant in variants]
        if not all(map(_is_number, values)):
            continue
        lines: dict[str, Points] = {}
        for variant, value in zip(variants, values, strict=True):
            others = " ".join(text for key, text in variant.settings if key != name)
            own = [run for run in runs if run.variant == variant.name]
            lines.setdefault(others, []).append((float(value), own))
        if any(len(points) > 1 for points in lines.values()):
            for points in lines.values():
                points.sort(key=lambda point: point[0])
            found[name] = lines
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def metric_by_setting(
    setting: str, lines: Mapping[str, Points], selection: Selection, path: Path
) -> None:
    """Plot the test metric against a numeric setting.

    Dots are runs, and lines connect their means. Crosses are failed runs.
    """
    figure = Figure(figsize=(8, 4.2) if any(lines) else (6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    failures: list[tuple[float, str]] = []
    for color, (label, points) in enumerate(lines.items()):
        hue = f"C{color % 10}"
        means = []
        for x, runs in points:
            values = _test_values(runs, selection)
            mean, *_ = mean_and_interval(values)
            if mean is not None:
                means.append((x, mean))
            axes.plot([x] * len(values), values, "o", color=hue, alpha=0.4, markersize=4)
            failures += [(x, hue) for run in runs if run.failure is not None]
        line = [x for x, _ in means], [mean for _, mean in means]
        axes.plot(*line, color=hue, label=label or None)
    level = _failure_level(lines, selection)
    for x, hue in failures:
        axes.plot(x, level, "x", color=hue)
    positions = [x for points in lines.values() for x, _ in points]
    if min(positions) > 0 and max(positions) / min(positions) >= 10:
        axes.set_xscale("log")
    elif all(x == int(x) for x in positions):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    note = " (x: failed run)" if failures else ""
    axes.set(xlabel=setting, ylabel=selection.test_label + note)
    if any(lines):
        axes.legend(**BESIDE)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _test_values(runs: Iterable[Run], selection: Selection) -> list[float]:
    values = [run.result.get(selection.test_metric) for run in runs if run.failure is None]
    return [float(value) for value in values if value is not None]


def _failure_level(lines: Mapping[str, Points], selection: Selection) -> float:
    """Return the y position of failed runs: 0, or the worst value of a minimized metric."""
    if selection.mode == "max":
        return 0.0
    runs = [run for points in lines.values() for _, runs in points for run in runs]
    return selection.worst([0.0, *_test_values(runs, selection)])
