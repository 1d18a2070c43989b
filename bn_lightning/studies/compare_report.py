"""What a comparison leaves: its table in several formats, its runs, and plots."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bn_lightning import terminal
from bn_lightning.runs import result
from bn_lightning.studies import compare_table, plots, statistics
from bn_lightning.studies.statistics import Run, Selection
from bn_lightning.studies.variants import Variant
from bn_lightning.training import checkpoints

# Column names, and the cells of each line.
Table = tuple[list[str], list[list[str]]]


def write(
    place: Path,
    runs: Sequence[Run],
    compared: Sequence[Variant],
    selection: Selection,
    threshold: float | None,
) -> None:
    """Print the table, and write it into the folder of the study, with its runs and plots.

    Args:
        threshold: value of the validation metric to which steps are counted; None for one that
            every variant has reached.
    """
    if threshold is None:
        threshold = statistics.reached_by_all(runs, selection)
    references = {variant.name: variant.reference for variant in compared}
    metrics = statistics.reported_metrics(runs, selection, threshold)
    rows = statistics.rows(runs, metrics, references)
    of_runs = [_data(run, metrics) for run in runs]
    failures = [
        f"{run.variant}, seed {run.seed}: {run.failure} ({run.folder})"
        for run in runs
        if run.failure
    ]
    tables: list[Table] = []
    for metric in metrics:
        heads = compare_table.heads(metric.name, set(references.values()))
        own = [row for row in rows if row.metric == metric.name]
        tables.append((heads, [compare_table.cells(row, metric.digits) for row in own]))
    text = _plain(tables, failures)
    print(text, end="")
    data = [row.as_data() for row in rows]
    files = {
        "table.md": _markdown(tables, failures),
        "table.csv": compare_table.as_csv(data),
        "runs.csv": compare_table.as_csv(of_runs),
        "table.json": result.to_json({"rows": data, "runs": of_runs}) + "\n",
        "table.txt": text,
    }
    for name, content in files.items():
        checkpoints.write_whole(place / name, content.encode())
    plots.learning_curves(runs, selection, place / "curves.png")
    for name, lines in plots.numeric_settings(runs, compared).items():
        plots.against(name, lines, selection, place / f"{name}.png")
    print(
        f"{len(runs)} runs, {len(failures)} failed; table, runs and pictures are in {place}",
        flush=True,
    )


def _data(run: Run, metrics: Sequence[statistics.ReportedMetric]) -> dict[str, Any]:
    """Return the line of a run in runs.csv."""
    about = {"variant": run.variant, "seed": run.seed, "folder": run.folder, "failure": run.failure}
    about = {statistics.KEYS.get(name, name): value for name, value in about.items()}
    return about | {metric.name: metric.value_of(run) for metric in metrics}


def _plain(tables: Sequence[Table], failures: Sequence[str]) -> str:
    # Also at a terminal without its colors and its width, since it is written into a file too.
    with redirect_stdout(io.StringIO()):
        text = "".join(f"{terminal.table(*parts)}\n\n" for parts in tables)
    return text + "".join(f"failed: {line}\n" for line in failures)


def _markdown(tables: Sequence[Table], failures: Sequence[str]) -> str:
    text = "\n".join(compare_table.markdown(*parts) for parts in tables)
    return text + "".join(f"\n- failed: {line}" for line in failures)
