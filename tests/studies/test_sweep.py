"""A search that chooses by held-out images, that goes on however it was stopped, on one machine or several."""

import csv
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import command
from tests.support import sweep_kills

CONFIG = """\
data: {source: sample}
trainer: {max_epochs: 2, accelerator: cpu}
model: {optimizer_args: {nesterov: true, momentum: 0.5}}
sweep:
  trials: 4
  sampler: random
  space:
    model.lr: {low: 0.05, high: 1.0, log: true}
    model.optimizer_args.momentum: [0.5, 0.9]
    data.batch_size: {low: 64, high: 256, step: 64}
"""
ARGUMENTS = ("sweep", "--config", "sweep.yaml", "--jobs", "2")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a search on the sample, and what it printed. Not to be changed by a test."""
    cwd = tmp_path_factory.mktemp("swept")
    (cwd / "sweep.yaml").write_text(CONFIG)
    return cwd, command(*ARGUMENTS, cwd=cwd).stdout


def trials_of(cwd):
    return list(csv.DictReader((cwd / "runs/sweep/trials.csv").open()))


def test_it_tries_what_it_is_told_and_never_looks_at_the_test_set(swept):
    trials = trials_of(swept[0])
    assert len(trials) == 4
    for trial in trials:
        settings = yaml.safe_load((swept[0] / trial["folder"] / "config.yaml").read_text())
        result = yaml.safe_load((swept[0] / trial["folder"] / "result.json").read_text())
        assert result["test_acc"] is None and result["finished"]
        assert settings["model"]["lr"] == float(trial["model.lr"]) and 0.05 <= settings["model"]["lr"] <= 1
        assert settings["data"]["batch_size"] == int(trial["data.batch_size"]) in (64, 128, 192, 256)
        momentum = float(trial["model.optimizer_args.momentum"])
        assert settings["model"]["optimizer_args"] == {"nesterov": True, "momentum": momentum}
        if trial["state"] == "finished":
            assert float(trial["val_acc"]) == result["val_acc"]
    for name in ("history", "importance"):
        with Image.open(swept[0] / f"runs/sweep/{name}.png") as picture:
            assert len(picture.convert("L").getcolors(256)) > 20


def test_the_winner_is_a_config_for_fit(swept, main):
    best = max((t for t in trials_of(swept[0]) if t["state"] == "finished"), key=lambda trial: float(trial["val_acc"]))
    winner = swept[0] / "runs/sweep/winner.yaml"
    assert "sweep" not in yaml.safe_load(winner.read_text())
    code, _, err = main("fit", "--config", winner, "--data.source", "sample")
    assert code == 0, err
    result = yaml.safe_load(Path("runs/sweep-winner/0/result.json").read_text())
    assert result["val_acc"] == pytest.approx(float(best["val_acc"]), abs=0.02)  # on another number of threads
    assert result["test_acc"] > 0.1


def test_a_search_that_is_done_does_nothing_and_says_the_same(swept):
    again = command(*ARGUMENTS, cwd=swept[0]).stdout
    assert again == "".join(line for line in swept[1].splitlines(True) if not line.startswith("["))
    assert len(list((swept[0] / "runs/sweep").glob("trial-*"))) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.lr": {"low": 0.05, "high": 2.0, "log": True}}, "--sweep.space was"),
        ({"model.lr": {"low": 2.0, "high": 1.0}}, "The space of model.lr is"),
        ({"model.lr": []}, "The space of model.lr is"),
        ({"model.lr": {"low": "1e-3", "high": 1.0}}, "1e-3 is a text in YAML"),
        ({"model.lr": {"low": 0.0, "high": 1.0, "log": True}}, "The space of model.lr is"),
        ({"data.val_images": [0, 5000]}, "A sweep chooses by the accuracy on held-out training images"),
        ({"model.rate": [1]}, "Did you mean"),
        ({"model.norm": ["custom", "layer"]}, "There is no norm 'layer'"),
        ({}, "There is no space to search in"),
    ],
)
def test_another_space_is_refused(swept, main, monkeypatch, change, said):
    monkeypatch.chdir(swept[0])
    config = yaml.safe_load(CONFIG)
    config["sweep"]["space"] = config["sweep"]["space"] | change if change else {}
    Path("other.yaml").write_text(yaml.safe_dump(config))
    code, _, err = main("sweep", "--config", "other.yaml")
    assert code == 2 and said in err and len(err.splitlines()) < 25, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model.lr", "0.5"), "--model.lr was 1.0 and is now 0.5"),
        (("--data.val_images", "0"), "A sweep chooses by the accuracy on held-out training images"),
        (("--sampler", "grid"), "invalid choice: 'grid'"),
        (("--trials", "0"), "trials is 0"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--storage", "mydb"), "The storage of the study cannot be used"),
        (("--storage", "sqlite:///other.db"), "lie the runs of another study"),
        (("--storage", "postgresql://nobody:secret@127.0.0.1:1/none"), "The storage of the study cannot be used"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(swept, main, monkeypatch, arguments, said):
    monkeypatch.chdir(swept[0])
    code, _, err = main(*ARGUMENTS, *arguments)
    assert code == 2 and said in err and len(err.splitlines()) < 25, err
    assert "secret" not in err


def test_what_is_no_number_is_counted_as_failed_and_learned_from(main):
    config = {
        "data": {"source": "sample"},
        "model": {"norm": "none", "activation": "relu"},
        "trainer": {"max_epochs": 1, "limit_train_batches": 5, "accelerator": "cpu"},
        "sweep": {"trials": 3, "sampler": "random", "space": {"model.lr": [1e30]}},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    code, out, err = main("sweep", "--config", "sweep.yaml")
    assert code == 0, err
    assert out.count("FAILED: the loss is no number in step") == 3
    assert "3 trials: 0 finished, 0 ended early, 3 failed" in out and "there is no winner" in out
    again = main("sweep", "--config", "sweep.yaml")[1]
    assert "FAILED" not in again and "3 failed" in again


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
    who = {"user": "postgres"} if as_root else {}  # it refuses to run as root
    place = tmp_path_factory.mktemp("postgresql")
    if as_root:
        for folder in (place, *place.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o711)
        shutil.chown(place, "postgres")
    port = random.randint(20_000, 60_000)
    subprocess.run(
        [programs / "initdb", "-D", place / "data", "-A", "trust", "-U", "tester"], check=True, cwd=place, **who
    )
    options = f"-p {port} -k {place} -c listen_addresses=127.0.0.1"
    control = [programs / "pg_ctl", "-D", place / "data", "-w"]
    subprocess.run([*control, "-o", options, "-l", place / "log", "start"], check=True, cwd=place, **who)
    yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=place, **who)


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
    assert "again)" in log and "tester" not in (here / "runs/sweep/winner.yaml").read_text()
    assert sweep_kills.start(there, "--storage", postgresql).wait(timeout=100) == 0
    assert sweep_kills.trials(storage) == found  # nothing more was done
    assert (there / "runs/sweep/winner.yaml").read_text() == (here / "runs/sweep/winner.yaml").read_text()
