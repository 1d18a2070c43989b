"""Pictures of many runs: learning curves with bands, and accuracy against a setting."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bn_lightning.studies.statistics import Run, mean_and_interval, validated_on_test_set


def learning_curves(runs: Sequence[Run], path: Path) -> None:
    """Train loss by epoch and validation accuracy by step: means over seeds, bands from the lowest to the highest."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (choice, of_choice) in enumerate(_by_choice(runs)):
        losses = [[(epoch, row["train_loss"]) for epoch, row in enumerate(run.epochs, 1)] for run in of_choice]
        _band(left, losses, choice, color)
        accuracies = [[(row["step"], row["val_acc"]) for row in run.validations] for run in of_choice]
        _band(right, accuracies, choice, color)
    left.set(xlabel="epoch", ylabel="train loss")
    right.set(xlabel="step", ylabel=f"{'test' if validated_on_test_set(runs) else 'validation'} accuracy")
    right.legend(title="mean over seeds, lowest to highest", loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _by_choice(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    choices = dict.fromkeys(run.choice for run in runs)
    return [(choice, [run for run in runs if run.choice == choice and run.failure is None]) for choice in choices]


def _band(axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], label: str, color: int) -> None:
    at = [x for x, _ in max(curves, key=len, default=[])]
    values = [[curve[i][1] for curve in curves if i < len(curve)] for i in range(len(at))]
    hue = f"C{color % 10}"
    axes.plot(at, [statistics.fmean(v) for v in values], label=label, color=hue)
    axes.fill_between(at, list(map(min, values)), list(map(max, values)), color=hue, alpha=0.15, linewidth=0)


def against(setting: str, lines: dict[str, list[tuple[float, list[Run]]]], path: Path) -> None:
    """Test accuracy against a setting that is a number: points for runs, lines through means, crosses for failures."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    has_failures = False
    for color, (label, points) in enumerate(lines.items()):
        hue, means = f"C{color % 10}", []
        for x, runs in points:
            done = [run for run in runs if run.failure is None]
            accuracies = [run.result["test_acc"] for run in done if run.result["test_acc"] is not None]
            mean, *_ = mean_and_interval(accuracies)
            if mean is not None:
                means.append((x, mean))
            axes.plot([x] * len(accuracies), accuracies, "o", color=hue, alpha=0.4, markersize=4)
            failed = len(runs) - len(done)
            has_failures |= failed > 0
            axes.plot([x] * failed, [0.0] * failed, "x", color=hue)
        axes.plot([x for x, _ in means], [mean for _, mean in means], color=hue, label=label or None)
    values = [x for points in lines.values() for x, _ in points]
    if min(values) > 0 and max(values) / min(values) >= 10:
        axes.set_xscale("log")
    axes.set(xlabel=setting, ylabel="test accuracy" + (" (x: the loss was no number)" if has_failures else ""))
    if any(lines):
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
