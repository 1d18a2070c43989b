"""The output files of `compare`: tables in several formats, the list of runs, and plots."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bn_lightning import terminal
from bn_lightning.errors import report_failure
from bn_lightning.runs import result
from bn_lightning.studies import (
    compare_table,
    plots,
    repetitions,
    shared_settings,
    statistics,
    study,
    variants,
)
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant
from bn_lightning.training import checkpoints

# With fewer runs per variant, a note warns about the intervals.
FEW = 5

# Column names, and the cells of each row.
Table = tuple[list[str], list[list[str]]]


def write(
    folder: Path,
    runs: Sequence[Run],
    compared: Sequence[Variant],
    selection: Selection,
    threshold: float | None,
    settings: Mapping[str, Any],
) -> None:
    """Print the tables; write tables, runs and plots into the folder of the study.

    Args:
        threshold: validation metric up to which steps are counted. None selects the
            final value of the worst variant.
        settings: settings that all runs share and that are not the defaults of `fit`.
    """
    is_given = threshold is not None
    if threshold is None:
        threshold = statistics.default_threshold(runs, selection)
    baselines = {variant.name: variant.baseline for variant in compared}
    metrics = statistics.reported_metrics(runs, selection, threshold)
    rows = statistics.rows(runs, metrics, baselines)
    run_data = [_run_data(run, metrics) for run in runs]
    failures = [
        f"{run.variant}, {run.repetition}: {run.failure} ({run.folder})"
        for run in runs
        if run.failure
    ]
    tables: list[Table] = []
    label = variants.baseline_label(compared)
    for metric in metrics:
        header = compare_table.header(metric.name, label)
        cells = [
            compare_table.cells(row, metric.digits) for row in rows if row.metric == metric.name
        ]
        tables.append((header, cells))
    stale = describe_stale(runs)
    remarks = notes(runs, rows, selection, None if is_given else threshold)
    footer = shared_settings.describe(settings) + stale
    footer += "".join(f"note: {remark}\n" for remark in remarks)
    text = _as_text(tables, failures) + footer
    print(text, end="")
    row_data = [row.as_data() for row in rows]
    files = {
        "table.md": _as_markdown(tables, failures) + f"\n{footer}",
        "table.csv": compare_table.as_csv(row_data),
        "runs.csv": compare_table.as_csv(run_data),
        "table.json": result.to_json({"settings": settings, "rows": row_data, "runs": run_data})
        + "\n",
        "table.txt": text,
    }
    for name, content in files.items():
        checkpoints.write_atomically(folder / name, content.encode())
    with report_failure("curves.png cannot be drawn"):
        plots.learning_curves(runs, selection, folder / "curves.png")
    for name, lines in plots.numeric_settings(runs, compared).items():
        with report_failure(f"{name}.png cannot be drawn"):
            plots.metric_by_setting(name, lines, selection, folder / f"{name}.png")
    print(
        f"{len(runs)} runs, {len(failures)} failed. Tables and plots are in {folder}",
        flush=True,
    )


def notes(
    runs: Sequence[Run],
    rows: Sequence[statistics.Row],
    selection: Selection,
    threshold: float | None,
) -> list[str]:
    """Return remarks on the tables: the epoch of a metric, and the number of repetitions.

    Args:
        threshold: the threshold if it was derived from the runs, otherwise None.
    """
    found = []
    tested = {run.result.get("tested") for run in runs if run.result}
    if tested == {"best.ckpt"}:
        found.append(
            f"{selection.label} and {selection.test_label} are those of the checkpoint with the "
            f"best {selection.label}. train loss is that of the last epoch."
        )
    if threshold is not None:
        found.append(
            f"{statistics.steps_to(threshold)}: this threshold is derived from the last "
            "validation of the worst variant, not from its best one. --steps_to sets another."
        )
    all_repetitions = [run.repetition for run in runs]
    folds = [f"--vary.{name}" for name, _ in all_repetitions[0].settings]
    if folds:
        found.append(
            f"means, intervals and d are over {repetitions.count(all_repetitions)}. Runs that "
            "share training samples, as folds do, are not independent: the intervals are too "
            "narrow."
        )
    counts = [row.runs - row.failed for row in rows]
    n = min(filter(None, counts), default=FEW)
    advice = f"Use more values of {' or '.join(folds)}." if folds else f"Use --seeds {FEW} or more."
    if n == 1:
        found.append(f"n = 1: one run has no interval. {advice}")
    elif n < FEW:
        found.append(
            f"n = {n}: with so few runs, the intervals are wide and d is not reliable. {advice}"
        )
    return found


def describe_stale(runs: Sequence[Run]) -> str:
    """Return the stale runs by variant and reason, as lines; "" if no run is stale."""
    values: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        if run.stale:
            # For example `seed` and `0`, or `seed 0, fold` and `1`.
            name, _, value = str(run.repetition).rpartition(" ")
            values.setdefault((run.variant, name, run.stale), []).append(value)
    lines = [
        f"stale: {variant}, {name} {', '.join(found)}: {reason}\n"
        for (variant, name, reason), found in values.items()
    ]
    return "".join([*lines, study.RERUN] if lines else [])


def _run_data(run: Run, metrics: Sequence[statistics.ReportedMetric]) -> dict[str, Any]:
    """Return the row of a run in runs.csv."""
    about = {"variant": run.variant, "seed": run.repetition.seed, **dict(run.repetition.settings)}
    about |= {"folder": run.folder, "failure": run.failure}
    stale = {"stale": run.stale}
    about = {statistics.KEYS.get(name, name): value for name, value in about.items()}
    return about | {metric.name: metric.value_of(run) for metric in metrics} | stale


def _as_text(tables: Sequence[Table], failures: Sequence[str]) -> str:
    # The text is also written to a file. Without a terminal as stdout, `table` uses
    # neither colors nor the width of the terminal.
    with redirect_stdout(io.StringIO()):
        text = "".join(f"{terminal.table(*parts)}\n\n" for parts in tables)
    return text + "".join(f"failed: {line}\n" for line in failures)


def _as_markdown(tables: Sequence[Table], failures: Sequence[str]) -> str:
    text = "\n".join(compare_table.markdown(*parts) for parts in tables)
    return text + "".join(f"\n- failed: {line}" for line in failures)
