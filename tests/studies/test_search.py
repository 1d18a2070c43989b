"""The search of a sweep: its trials, and how they are resumed and retried."""

import argparse
import datetime
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.studies import search as searches
from bn_lightning.studies import workers
from bn_lightning.studies.code import Code
from bn_lightning.studies.search import Search
from tests.support import sweep_kills
from tests.support.processes import free_port

# pytest resets the filter that the module `search` sets.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SETTINGS = {"model.lr": 1.0}


@pytest.fixture
def open_search(tmp_path):
    """A function that opens the same study each time, and returns a `Search`."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def open_search(settings=SETTINGS, direction="maximize", defaults=None, **options):
        known = {"name": "s", "storage": None, "sampler": "random", "pruner": "none", "trials": 3}
        namespace = argparse.Namespace(**known | options)
        return Search(tmp_path, namespace, direction, settings, defaults or {})

    yield open_search
    optuna.logging.set_verbosity(before)


def numbers(search, state):
    return [trial.number for trial in search.get_trials(state)]


def test_the_requested_number_of_trials_is_run(open_search):
    search = open_search()
    search.run_trials(lambda trial: float(trial.number), threading.Event())
    assert [trial.value for trial in search.done()] == [0, 1, 2]
    again = open_search(trials=4)
    again.run_trials(lambda trial: float(trial.number), threading.Event())
    assert [trial.value for trial in again.done()] == [0, 1, 2, 3]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 0)])
def test_the_best_trial_depends_on_the_direction(open_search, direction, best):
    search = open_search(direction=direction)
    search.run_trials(lambda trial: float(trial.number), threading.Event())
    assert search.study.best_trial.number == best


def test_changed_settings_are_refused(open_search):
    open_search()
    open_search({"model.lr": 1.0, "new": 3}, defaults={"new": 3})
    with pytest.raises(UserError, match=r"--model\.lr was 1\.0 and is now 0\.5"):
        open_search({"model.lr": 0.5})


def test_a_folder_with_runs_of_another_storage_is_refused(open_search, tmp_path):
    open_search()
    (tmp_path / "trial-0").mkdir()
    with pytest.raises(UserError, match="contains the runs of another study"):
        open_search(storage=f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize("storage", ["mydb", "sqlite:////no/such/folder/study.db"])
def test_an_invalid_storage_is_refused(open_search, storage):
    with pytest.raises(UserError, match="The storage of the study cannot be used"):
        open_search(storage=storage)


def test_a_failed_run_counts_and_a_stopped_run_is_retried(open_search):
    search = open_search()

    def fail(trial):
        if trial.number == 0:
            trial.set_user_attr("failure", "why")
            raise RunFailed("why")
        raise workers.Interrupted

    with pytest.raises(workers.Interrupted):
        search.run_trials(fail, threading.Event())
    assert [trial.number for trial in search.done()] == [0]
    assert numbers(search, TrialState.WAITING) == [2]
    seen = []

    def note(trial):
        seen.append(searches.retry.retried_trial_number(search.get_trials()[trial.number]))
        return 1.0

    search.run_trials(note, threading.Event())
    assert seen == [1, None] and len(search.done()) == 3


def test_no_trial_starts_after_a_stop(open_search):
    search, stopped = open_search(), threading.Event()
    stopped.set()
    search.run_trials(lambda trial: 1.0, stopped)
    assert not search.get_trials()


def test_a_lost_trial_is_queued_once(open_search, monkeypatch):
    search = open_search()
    with pytest.warns(UserWarning, match="Heartbeat"):
        lost = search.study.ask()
    search.study.tell(lost, state=TrialState.FAIL)
    # Within the grace period, another process may still queue it.
    assert numbers(open_search(), TrialState.WAITING) == []
    later = datetime.datetime.now().timestamp() + 2 * searches.GRACE_PERIOD
    monkeypatch.setattr(searches.time, "time", lambda: later)
    assert numbers(open_search(), TrialState.WAITING) == [1]
    assert numbers(open_search(), TrialState.WAITING) == [1]


def test_a_trial_that_another_process_has_taken_over_is_not_repeated_here(open_search, capsys):
    search = open_search(trials=1)

    def objective(trial):
        # Another process marks the trial as failed, and queues a retry.
        if trial.number == 0:
            search.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            searches.retry(search.study, search.get_trials()[0])
        trial.report(1.0, 1)
        return 1.0

    search.run_trials(objective, threading.Event())
    message = "trial 0 had no heartbeat for 15 s; another process retries it"
    assert message in capsys.readouterr().out
    assert [trial.number for trial in search.done()] == [1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_kills_each_set_of_parameters_is_finished_once(tmp_path):
    found = sweep_kills.kill_and_resume(tmp_path, 2, random.Random(0))
    assert any(state == "FAIL" for _, state in found)


@pytest.fixture
def postgresql():
    """The URL of a PostgreSQL server that is started for the test."""
    found = [*map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), shutil.which("initdb")]
    if not found[0]:
        pytest.skip("needs PostgreSQL (package postgresql)")
    programs = Path(found[0]).parent
    as_root = os.geteuid() == 0
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres"} if as_root else {}
    # Not in pytest's folder: each session of pytest makes that folder inaccessible to other users.
    folder = Path(tempfile.mkdtemp())
    if as_root:
        shutil.chown(folder, "postgres")
    port = free_port()
    initdb = [programs / "initdb", "-D", folder / "data", "-A", "trust", "-U", "tester"]
    subprocess.run(initdb, check=True, cwd=folder, **user)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    control = [programs / "pg_ctl", "-D", folder / "data", "-w"]
    start = [*control, "-o", options, "-l", folder / "log", "start"]
    subprocess.run(start, check=True, cwd=folder, **user)
    yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=folder, **user)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_of_two_on_one_postgresql_study_is_replaced(postgresql, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for cwd in (here, there):
        cwd.mkdir()
    one, other = (sweep_kills.start(cwd, "--storage", postgresql) for cwd in (here, there))
    assert sweep_kills.wait_for_trial(there, other) and sweep_kills.wait_for_trial(here, one)
    other.send_signal(signal.SIGKILL)
    assert one.wait(timeout=280) == 0, (here / "log").read_text()
    storage = postgresql.replace("postgresql://", "postgresql+psycopg://")
    found = sweep_kills.assert_each_is_finished_once(storage, 8)
    assert any(state == "FAIL" for _, state in found)
    log = (here / "log").read_text()
    winners = [cwd / "runs/sweep/winner.yaml" for cwd in (here, there)]
    assert "(retry of trial " in log and "tester" not in winners[0].read_text()
    assert sweep_kills.start(there, "--storage", postgresql).wait(timeout=100) == 0
    assert sweep_kills.trials(storage) == found
    assert winners[1].read_text() == winners[0].read_text()


def test_a_trial_that_the_machine_failed_is_tried_again_by_the_next_command(open_search):
    search = open_search()

    def fail_first(trial):
        if trial.number == 0:
            trial.set_user_attr(searches.MACHINE_FAILURE, "killed")
            raise workers.MachineFailure("killed")
        return 1.0

    search.run_trials(fail_first, threading.Event())
    # This command continues with the other trials.
    assert [trial.number for trial in search.done()] == [1, 2, 0]
    again = open_search()
    assert numbers(again, TrialState.WAITING) == [3] and len(again.done()) == 2
    again.run_trials(lambda trial: 1.0, threading.Event())
    assert [trial.number for trial in again.done()] == [1, 2, 3]
    assert searches.MACHINE_FAILURE not in again.get_trials()[3].user_attrs
    assert searches.retry.retried_trial_number(again.get_trials()[3]) == 0


def test_a_full_disk_ends_the_sweep_and_uses_up_no_trials(open_search):
    def fail(trial):
        trial.set_user_attr(searches.MACHINE_FAILURE, "no space")
        raise workers.MachineFailure("no space", is_disk_full=True)

    search = open_search()
    with pytest.raises(RunFailed, match="the same command resumes the study"):
        search.run_trials(fail, threading.Event())
    assert len(search.get_trials()) == 1
    again = open_search()
    again.run_trials(lambda trial: 1.0, threading.Event())
    assert len(again.done()) == 3 and len(again.get_trials()) == 4


def test_stale_trials_are_repeated_on_request(open_search):
    def train(version):
        def run(trial):
            trial.suggest_float("x", 0, 1)
            trial.set_user_attr(searches.CODE, {"sources": {}, "versions": {"torch": version}})
            trial.set_user_attr("ends_early", True)
            return 1.0

        return run

    def code_of(params):
        assert params.keys() == {"x"}
        return Code({}, {"torch": "2"})

    search = open_search()
    search.run_trials(train("1"), threading.Event())
    stale = search.stale_trials(code_of)
    assert stale == dict.fromkeys(range(3), "torch was 1 and is now 2")
    search.repeat_stale_trials(stale)
    before = [trial.params for trial in search.get_trials()[:3]]
    assert search.done() == [] and numbers(search, TrialState.WAITING) == [3, 4, 5]
    assert not any(trial.user_attrs for trial in search.get_trials(TrialState.WAITING))
    search.run_trials(train("2"), threading.Event())
    assert [trial.params for trial in search.done()] == before
    assert not search.stale_trials(code_of)
