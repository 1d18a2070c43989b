"""One trial of a sweep: its value, pruning and failures. Nothing is trained here."""

import json
import math
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.errors import RunFailed
from bn_lightning.runs import result
from bn_lightning.studies import space as spaces
from bn_lightning.studies.objective import Objective
from bn_lightning.studies.statistics import Selection
from bn_lightning.studies.workers import MachineFailure, Progress

MAX, MIN = Selection("val_acc", "max"), Selection("val_rmse", "min")

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


class Pruner(optuna.pruners.BasePruner):
    """Prunes a trial whose last value is 9."""

    def prune(self, study, trial):
        return trial.intermediate_values[trial.last_step] == 9


class Pool:
    """Stands in for `Workers`. A run has the given values at its validations."""

    def __init__(self, folder, metric, values, failure=None):
        self.folder, self.metric, self.values, self.failure = folder, metric, values, failure
        self.validated = 0

    def fit(self, arguments, log, on_progress):
        self.arguments, self.log = arguments, log
        folder = log.parent / "0"
        if self.failure == "machine":
            raise MachineFailure("killed")
        folder.mkdir(parents=True)
        if self.failure:
            if self.failure == "loss":
                content = {"step": 7, "epoch": 0, "batch": 7}
                (folder / "failure.json").write_text(json.dumps(content))
            raise RunFailed("The worker process died.\nand more")
        for number in range(1, len(self.values) + 1):
            self.validated = number
            progress = Progress(number / len(self.values), self.values[:number])
            if not on_progress(progress):
                break
        last = self.values[self.validated - 1] if self.values else None
        result.write_json(folder / "result.json", {self.metric: last, f"{self.metric}_final": last})
        return folder


@pytest.fixture
def run(tmp_path):
    """A function that runs one trial, and returns the trial, its printed line and the pool."""

    def run(values, selection=MAX, failure=None):
        study = optuna.create_study(study_name="s", pruner=Pruner(), direction=selection.direction)
        search = SimpleNamespace(folder=tmp_path, study=study, get_trials=study.get_trials)
        pool = Pool(tmp_path, selection.metric, values, failure)
        lines = []
        progress = SimpleNamespace(
            advance=lambda key, fraction: None, end=lambda key, line: lines.append(line)
        )
        space = spaces.read({"model.lr": [0.1], "model.norm": ["none"]})
        objective = Objective(search, space, ["--common", "1"], selection, pool, progress)
        study.optimize(objective, n_trials=1, catch=RunFailed)
        [trial], [line] = study.get_trials(), lines
        return trial, line, pool

    return run


def test_the_value_of_a_finished_trial_is_the_selected_metric(run, tmp_path):
    trial, line, pool = run([0.5, 0.75])
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.75)
    assert trial.intermediate_values == {1: 0.5, 2: 0.75}
    assert line == "trial 0: lr 0.1, norm none: val acc 0.7500"
    assert trial.user_attrs["folder"] == str(tmp_path / "trial-0/0")
    assert trial.user_attrs["host"]
    assert pool.arguments[:2] == ["--common", "1"]
    flags = ["--model.lr", "0.1", "--model.norm", "none"]
    assert pool.arguments[2:] == [*flags, "--ckpt_path", "last", "--name", "s/trial-0"]
    assert pool.log == tmp_path / "trial-0/log.txt"


@pytest.mark.parametrize("selection", [MAX, MIN])
def test_the_pruner_ends_a_trial_early(run, selection):
    trial, line, pool = run([3.0, 9.0, 1.0], selection)
    assert (trial.state, trial.value, pool.validated) == (TrialState.PRUNED, 9.0, 2)
    assert line == f"trial 0: lr 0.1, norm none: ended early, {selection.label} 9.0000"
    assert trial.user_attrs["ends_early"] and "failure" not in trial.user_attrs


def test_a_finished_trial_is_not_ended_early(run):
    trial, _, _ = run([3.0, 9.0])
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 9.0)


def test_a_non_finite_loss_prunes_the_trial(run):
    trial, line, _ = run([], failure="loss")
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["failure"] == "non-finite loss at step 7, epoch 1"
    assert line.endswith("FAILED: non-finite loss at step 7, epoch 1")


def test_any_other_failure_fails_the_trial(run):
    trial, line, _ = run([], failure="process")
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["failure"] == "The worker process died."
    assert line.endswith("FAILED: The worker process died.")


def test_a_run_without_validation_has_no_value(run):
    trial, line, _ = run([])
    assert trial.state == TrialState.PRUNED
    assert line.endswith("FAILED: the run ended before its validation")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_non_finite_metric_prunes_the_trial(run, value):
    trial, line, _ = run([value], MIN)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["failure"] == "non-finite val rmse"
    assert line == "trial 0: lr 0.1, norm none: FAILED: non-finite val rmse"


def test_a_failure_of_the_machine_is_not_the_failure_of_the_trial(run):
    trial, line, _ = run([], failure="machine")
    assert trial.state == TrialState.FAIL and "failure" not in trial.user_attrs
    assert trial.user_attrs["machine_failure"] == "killed"
    assert line.endswith("FAILED: killed")
