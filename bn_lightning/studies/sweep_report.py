"""What a sweep leaves: its trials, the config of the winner, and plots."""

import collections
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from bn_lightning import terminal
from bn_lightning.runs import folder
from bn_lightning.studies import compare_table
from bn_lightning.studies.search import Search
from bn_lightning.studies.statistics import Selection
from bn_lightning.training import checkpoints


def write(
    search: Search,
    name: str,
    selection: Selection,
    settings: Mapping[str, Any],
) -> None:
    """Print the best trials; write all of them, the winner's config and plots.

    Args:
        name: of the study.
        settings: those that all trials share, where they are not the defaults of `fit`.
    """
    trials = ranked(search.done(), selection)
    lines = [_data(trial, selection) for trial in trials]
    checkpoints.write_whole(search.place / "trials.csv", compare_table.as_csv(lines).encode())
    shown = [column for column in lines[0] if column not in ("host", "failure")]
    rows = [[_cell(line.get(column)) for column in shown] for line in lines[:10]]
    heads = [column.rpartition(".")[2] for column in shown]
    terminal.print_table(heads, rows, folds=len(shown) - 1)
    states = collections.Counter(map(_state, trials))
    counts = ", ".join(
        f"{states[state]} {state}" for state in ("finished", "ended early", "failed")
    )
    print(f"\n{len(trials)} trials: {counts}; all in {search.place / 'trials.csv'}")
    best = trials[0]
    if best.state != TrialState.COMPLETE:
        print("No trial is finished, so there is no winner.", flush=True)
        return
    winner = search.place / "winner.yaml"
    comment = (
        f"# The best of {len(trials)} trials of the sweep {name}: trial {best.number}, "
        f"{selection.label} {best.value:.4f}.\n#\n"
        f"#     {terminal.program()} fit --config {winner.as_posix()}\n"
    )
    content = folder.nested({"name": f"{name}-winner", **settings, **best.params})
    text = comment + yaml.safe_dump(content, sort_keys=False)
    checkpoints.write_whole(winner, text.encode())
    _plot(search.study, search.place)
    command = shlex.join(["fit", "--config", str(winner)])
    print(f"the winner, trial {best.number}: {command}", flush=True)


def ranked(trials: Sequence[FrozenTrial], selection: Selection) -> list[FrozenTrial]:
    """Return finished trials from best to worst, then the others."""

    def key(trial: FrozenTrial) -> tuple[bool, float]:
        return trial.state != TrialState.COMPLETE, selection.rank(trial.value)

    return sorted(trials, key=key)


def _state(trial: FrozenTrial) -> str:
    if "failure" in trial.user_attrs:
        return "failed"
    return "finished" if trial.state == TrialState.COMPLETE else "ended early"


def _data(trial: FrozenTrial, selection: Selection) -> dict[str, Any]:
    """Return the line of a trial in trials.csv."""
    return {
        "trial": trial.number,
        "state": _state(trial),
        selection.metric: trial.value,
        "validations": trial.last_step or 0,
        **trial.params,
        **{name: trial.user_attrs.get(name) for name in ("folder", "host", "failure")},
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(study: optuna.Study, place: Path) -> None:
    matplotlib.use("Agg")
    plots: dict[str, Callable[[optuna.Study], Any]] = {
        "history": optuna.visualization.matplotlib.plot_optimization_history,
        "importance": optuna.visualization.matplotlib.plot_param_importances,
    }
    for name, plot in plots.items():
        try:
            figure = plot(study).figure
            figure.savefig(place / f"{name}.png", dpi=120, bbox_inches="tight")
        except (ValueError, RuntimeError) as error:  # one trial, or trials that are all alike
            print(f"no picture of {name}: {error}")
