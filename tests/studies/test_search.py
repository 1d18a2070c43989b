"""A search that continues however it was stopped, on one machine or on several."""

import argparse
import datetime
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.studies import search as searches
from bn_lightning.studies import workers
from bn_lightning.studies.search import Search
from tests.support import sweep_kills

# pytest resets the filters that `search` sets.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SETTINGS = {"model.lr": 1.0}


@pytest.fixture
def begin(tmp_path):
    """Open the study in a folder: `begin(settings)` gives a `Search`."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def begin(settings=SETTINGS, direction="maximize", defaults=None, **options):
        known = {"name": "s", "storage": None, "sampler": "random", "pruner": "none", "trials": 3}
        namespace = argparse.Namespace(**known | options)
        return Search(tmp_path, namespace, direction, settings, defaults or {})

    yield begin
    optuna.logging.set_verbosity(before)


def numbers(search, state):
    return [trial.number for trial in search.trials_of(state)]


def test_as_many_trials_as_wanted_are_run(begin):
    search = begin()
    search.work(lambda trial: float(trial.number), threading.Event())
    assert [trial.value for trial in search.done()] == [0, 1, 2]
    again = begin(trials=4)
    again.work(lambda trial: float(trial.number), threading.Event())
    assert [trial.value for trial in again.done()] == [0, 1, 2, 3]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 0)])
def test_the_direction_is_that_of_the_metric(begin, direction, best):
    search = begin(direction=direction)
    search.work(lambda trial: float(trial.number), threading.Event())
    assert search.study.best_trial.number == best


def test_other_settings_are_refused(begin):
    begin()
    begin({"model.lr": 1.0, "new": 3}, defaults={"new": 3})
    with pytest.raises(UserError, match=r"--model\.lr was 1\.0 and is now 0\.5"):
        begin({"model.lr": 0.5})


def test_the_runs_of_another_storage_are_refused(begin, tmp_path):
    begin()
    (tmp_path / "trial-0").mkdir()
    with pytest.raises(UserError, match="has the runs of another study"):
        begin(storage=f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize("storage", ["mydb", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_cannot_be_used_is_a_mistake(begin, storage):
    with pytest.raises(UserError, match="The storage of the study cannot be used"):
        begin(storage=storage)


def test_a_failed_run_counts_and_a_stopped_one_is_repeated(begin):
    search = begin()

    def fail(trial):
        if trial.number == 0:
            trial.set_user_attr("failure", "why")
            raise RunFailed("why")
        raise workers.Interrupted

    with pytest.raises(workers.Interrupted):
        search.work(fail, threading.Event())
    assert [trial.number for trial in search.done()] == [0]
    assert numbers(search, TrialState.WAITING) == [2]
    seen = []

    def note(trial):
        seen.append(searches.retry.retried_trial_number(search.trials_of()[trial.number]))
        return 1.0

    search.work(note, threading.Event())
    assert seen == [1, None] and len(search.done()) == 3


def test_nothing_begins_after_a_stop(begin):
    search, stopped = begin(), threading.Event()
    stopped.set()
    search.work(lambda trial: 1.0, stopped)
    assert not search.trials_of()


def test_a_trial_that_was_lost_is_queued_once(begin, monkeypatch):
    search = begin()
    with pytest.warns(UserWarning, match="Heartbeat"):
        lost = search.study.ask()
    search.study.tell(lost, state=TrialState.FAIL)
    # Another process may be about to queue it.
    assert numbers(begin(), TrialState.WAITING) == []
    later = datetime.datetime.now().timestamp() + 2 * searches.SILENCE
    monkeypatch.setattr(searches.time, "time", lambda: later)
    assert numbers(begin(), TrialState.WAITING) == [1]
    assert numbers(begin(), TrialState.WAITING) == [1]


def test_a_trial_that_another_process_has_taken_over_is_left_to_it(begin, capsys):
    search = begin(trials=1)

    def objective(trial):
        if trial.number == 0:  # this process was silent for too long
            search.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            searches.retry(search.study, search.trials_of()[0])
        trial.report(1.0, 1)
        return 1.0

    search.work(objective, threading.Event())
    assert "trial 0 was silent, and another process has taken it over" in capsys.readouterr().out
    assert [trial.number for trial in search.done()] == [1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_leave_each_set_of_parameters_finished_once(tmp_path):
    found = sweep_kills.survive(tmp_path, 3, random.Random(0))
    assert any(state == "FAIL" for _, state in found)


@pytest.fixture
def postgresql(tmp_path_factory):
    """The address of a real server that is this test's own."""
    found = [*map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), shutil.which("initdb")]
    if not found[0]:
        pytest.skip("needs PostgreSQL (package postgresql)")
    programs = Path(found[0]).parent
    as_root = os.geteuid() == 0
    user = {"user": "postgres"} if as_root else {}  # it refuses to run as root
    place = tmp_path_factory.mktemp("postgresql")
    if as_root:
        for folder in (place, *place.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o711)
        shutil.chown(place, "postgres")
    port = random.randint(20_000, 60_000)
    initdb = [programs / "initdb", "-D", place / "data", "-A", "trust", "-U", "tester"]
    subprocess.run(initdb, check=True, cwd=place, **user)
    options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1"
    control = [programs / "pg_ctl", "-D", place / "data", "-w"]
    start = [*control, "-o", options, "-l", place / "log", "start"]
    subprocess.run(start, check=True, cwd=place, **user)
    yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=place, **user)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_on_one_postgresql_study_one_of_them_killed(postgresql, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for cwd in (here, there):
        cwd.mkdir()
    one, other = (sweep_kills.start(cwd, "--storage", postgresql) for cwd in (here, there))
    assert sweep_kills.wait_for_a_trial(there, other) and sweep_kills.wait_for_a_trial(here, one)
    other.send_signal(signal.SIGKILL)
    assert one.wait(timeout=280) == 0, (here / "log").read_text()
    storage = postgresql.replace("postgresql://", "postgresql+psycopg://")
    found = sweep_kills.assert_each_was_finished_once(storage, 12)
    assert any(state == "FAIL" for _, state in found)
    log = (here / "log").read_text()
    winners = [cwd / "runs/sweep/winner.yaml" for cwd in (here, there)]
    assert "again)" in log and "tester" not in winners[0].read_text()
    assert sweep_kills.start(there, "--storage", postgresql).wait(timeout=100) == 0
    assert sweep_kills.trials(storage) == found  # nothing more was done
    assert winners[1].read_text() == winners[0].read_text()
