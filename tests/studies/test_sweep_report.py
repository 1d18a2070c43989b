"""The output files of `sweep`, written from given trials."""

import csv
from types import SimpleNamespace

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from bn_lightning import terminal
from bn_lightning.studies import sweep_report
from bn_lightning.studies.statistics import Selection

MAX, MIN = Selection("val_acc", "max"), Selection("val_rmse", "min")
RATES = [0.1, 0.2, 0.4, 0.8]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def trial(state, value, rate=0.1, **attributes):
    steps = {} if value is None else {1: value}
    return create_trial(
        state=state,
        value=value,
        params={"model.lr": rate},
        distributions={"model.lr": CategoricalDistribution(RATES)},
        user_attrs={"folder": "there", "host": "h"} | attributes,
        intermediate_values=steps,
    )


def search(folder, selection, trials):
    study = optuna.create_study(direction=selection.direction)
    study.add_trials(trials)
    return SimpleNamespace(folder=folder, study=study, done=study.get_trials)


@pytest.mark.parametrize(("selection", "order"), [(MAX, [2, 0, 1]), (MIN, [1, 0, 2])])
def test_finished_trials_are_ranked_before_all_others(tmp_path, selection, order):
    values = [0.5, 0.25, 1.0]
    complete = [trial(TrialState.COMPLETE, value) for value in values]
    pruned = [trial(TrialState.PRUNED, value) for value in (None, *values)]
    found = search(tmp_path, selection, [*pruned, *complete]).done()
    ranked = sweep_report.ranked(found, selection)
    assert [one.value for one in ranked] == [*(values[i] for i in order * 2), None]
    assert all(one.state == TrialState.COMPLETE for one in ranked[:3])


@pytest.mark.parametrize(("selection", "best"), [(MAX, 3), (MIN, 1)])
def test_all_trials_are_listed_and_the_best_is_a_config(
    tmp_path, monkeypatch, capsys, selection, best
):
    monkeypatch.setattr(terminal, "_program", "python -m shoes")
    trials = [
        trial(TrialState.PRUNED, None, failure="non-finite loss"),
        *(trial(TrialState.COMPLETE, rate, rate) for rate in RATES[:3]),
        trial(TrialState.PRUNED, 9.0, 0.8),
    ]
    found = search(tmp_path, selection, trials)
    sweep_report.write(found, "s", selection, {"trainer.max_epochs": 2, "model.width": 8})
    out = capsys.readouterr().out
    assert "5 trials: 3 finished, 1 ended early, 1 failed" in out
    winner = tmp_path / "winner.yaml"
    assert f"Best trial: {best}." in out
    assert f"    python -m shoes fit --config {winner}\n" in out

    lines = list(csv.DictReader((tmp_path / "trials.csv").open()))
    columns = ["trial", "state", selection.metric, "validations", "model.lr"]
    assert list(lines[0]) == [*columns, "folder", "host", "failure"]
    states = [line["state"] for line in lines]
    assert states == ["finished"] * 3 + ["ended early", "failed"]
    assert lines[0]["trial"] == str(best) and lines[-1]["failure"] == "non-finite loss"

    rate = RATES[best - 1]
    assert winner.read_text().splitlines()[:3] == [
        f"# The best of 5 trials in the sweep 's': trial {best}, {selection.label} {rate:.4f}.",
        "#",
        f"#     python -m shoes fit --config {winner.as_posix()}",
    ]
    assert yaml.safe_load(winner.read_text()) == {
        "name": "s-winner",
        "trainer": {"max_epochs": 2},
        "model": {"width": 8, "lr": rate},
    }
    for name in ("history", "importance"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20


def test_without_a_finished_trial_there_is_no_best_config(tmp_path, capsys):
    found = search(tmp_path, MAX, [trial(TrialState.PRUNED, None, failure="non-finite loss")])
    sweep_report.write(found, "s", MAX, {})
    out = capsys.readouterr().out
    assert (
        "1 trials: 0 finished, 0 ended early, 1 failed" in out and "there is no best trial" in out
    )
    assert not (tmp_path / "winner.yaml").exists()


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_a_plot_that_fails_is_one_line_and_the_best_config_is_written(tmp_path, capsys):
    choices = [{"eps": 0.001}, {"eps": 0.0001}]
    trials = [
        create_trial(
            value=value,
            params={"model.norm_args": choice, "model.lr": value},
            distributions={
                "model.norm_args": CategoricalDistribution(choices),
                "model.lr": CategoricalDistribution([0.5, 0.75]),
            },
        )
        for value, choice in zip([0.5, 0.75], choices, strict=True)
    ]
    sweep_report.write(search(tmp_path, MAX, trials), "s", MAX, {})
    captured = capsys.readouterr()
    assert "Best trial: 1." in captured.out
    assert captured.err.splitlines() == [
        "WARNING: importance.png cannot be drawn: TypeError: unhashable type: 'dict'"
    ]
    assert yaml.safe_load((tmp_path / "winner.yaml").read_text())["model"]["norm_args"] == {
        "eps": 0.0001
    }
