"""The output files of `sweep`: the list of trials, the config of the best one, and plots."""

import collections
import io
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from bn_lightning import terminal
from bn_lightning.errors import report_failure
from bn_lightning.runs import folder
from bn_lightning.studies import compare_table, shared_settings, study
from bn_lightning.studies.search import MACHINE_FAILURE, Search
from bn_lightning.studies.statistics import Selection
from bn_lightning.training import checkpoints


def write(
    search: Search,
    name: str,
    selection: Selection,
    settings: Mapping[str, Any],
    stale: Mapping[int, str] | None = None,
) -> None:
    """Print the best trials; write all trials, the config of the best one, and plots.

    Args:
        name: name of the study.
        settings: settings that all trials share and that are not the defaults of `fit`.
        stale: for each trial of other code, how the current code differs.
    """
    stale = stale or {}
    trials = ranked(search.done(), selection)
    rows = [_row(trial, selection, stale) for trial in trials]
    file = search.folder / "trials.csv"
    checkpoints.write_atomically(file, compare_table.as_csv(rows).encode())
    _print_best(rows)
    states = collections.Counter(map(_state, trials))
    counts = ", ".join(
        f"{states[state]} {state}" for state in ("finished", "ended early", "failed")
    )
    print(f"\n{len(trials)} trials: {counts}. All trials are in {file}")
    print(shared_settings.describe(settings), describe_stale(stale), sep="", end="")
    best = trials[0]
    if best.state != TrialState.COMPLETE:
        print("No trial has finished, so there is no best trial.", flush=True)
        return
    winner = search.folder / "winner.yaml"
    comment = (
        f"# The best of {len(trials)} trials in the sweep {name!r}: trial {best.number}, "
        f"{selection.label} {best.value:.4f}.\n#\n"
        f"#     {terminal.program()} fit --config {winner.as_posix()}\n"
    )
    content = folder.nested({"name": f"{name}-winner", **settings, **best.params})
    text = comment + yaml.safe_dump(content, sort_keys=False)
    checkpoints.write_atomically(winner, text.encode())
    # Without the trials that were repeated.
    study_of_done = optuna.create_study(direction=selection.direction)
    study_of_done.add_trials(sorted(trials, key=lambda trial: trial.number))
    _plot(study_of_done, selection, search.folder)
    command = f"{terminal.program()} fit --config {shlex.quote(str(winner))}"
    print(f"Best trial: {best.number}. Train with its settings:\n    {command}", flush=True)


def _print_best(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the first ten rows."""
    columns = [column for column in rows[0] if column not in ("host", "failure", "stale")]
    cells = [[_cell(row.get(column)) for column in columns] for row in rows[:10]]
    header = [column.rpartition(".")[2] for column in columns]
    terminal.print_table(header, cells, folds=len(columns) - 1)


def ranked(trials: Sequence[FrozenTrial], selection: Selection) -> list[FrozenTrial]:
    """Return the finished trials from best to worst, then all others."""

    def key(trial: FrozenTrial) -> tuple[bool, float]:
        return trial.state != TrialState.COMPLETE, selection.rank(trial.value)

    return sorted(trials, key=key)


def _state(trial: FrozenTrial) -> str:
    if {"failure", MACHINE_FAILURE} & trial.user_attrs.keys():
        return "failed"
    return "finished" if trial.state == TrialState.COMPLETE else "ended early"


def describe_stale(stale: Mapping[int, str]) -> str:
    """Return the numbers of stale trials by reason, as lines; "" if no trial is stale."""
    numbers: dict[str, list[str]] = {}
    for number, reason in stale.items():
        numbers.setdefault(reason, []).append(str(number))
    lines = [f"stale: trial {', '.join(found)}: {reason}\n" for reason, found in numbers.items()]
    return "".join([*lines, study.RERUN] if lines else [])


def _row(trial: FrozenTrial, selection: Selection, stale: Mapping[int, str]) -> dict[str, Any]:
    """Return the row of a trial in trials.csv."""
    attributes = {name: trial.user_attrs.get(name) for name in ("folder", "host", "failure")}
    attributes["failure"] = attributes["failure"] or trial.user_attrs.get(MACHINE_FAILURE)
    return {
        "trial": trial.number,
        "state": _state(trial) + (", stale" if trial.number in stale else ""),
        selection.metric: trial.value,
        "validations": trial.last_step or 0,
        **trial.params,
        **attributes,
        **({"stale": stale.get(trial.number)} if stale else {}),
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(trials: optuna.Study, selection: Selection, folder: Path) -> None:
    matplotlib.use("Agg")
    plots: dict[str, Callable[..., Any]] = {
        "history": optuna.visualization.matplotlib.plot_optimization_history,
        "importance": optuna.visualization.matplotlib.plot_param_importances,
    }
    for name, plot in plots.items():
        # Optuna needs at least two trials with different settings and values.
        with report_failure(f"{name}.png cannot be drawn"):
            figure = plot(trials, target_name=selection.label).figure
            picture = io.BytesIO()
            figure.savefig(picture, dpi=120, bbox_inches="tight")
            checkpoints.write_atomically(folder / f"{name}.png", picture.getbuffer())
