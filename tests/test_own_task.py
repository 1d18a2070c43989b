"""The project of the guide "Your own task": a Dataset, worker processes, a metric to maximize.

Its code and its commands are those that the guide prints.
"""

import csv
import json
import runpy
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY, command, run_here, start, weights
from tests.support import kills
from tests.test_readme import blocks

GUIDE = REPOSITORY / ".github/guides/own-task.md"
RUN = Path("runs/my_task/0")
BEST = RUN / "checkpoints/best.ckpt"
LAST = RUN / "checkpoints/last.ckpt"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Change to a folder with the files of the guide, and return a function that runs a command.

    `project(*arguments)` returns the command's output.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_table, main, experiment = blocks("python", [GUIDE])
    package = tmp_path / "my_task"
    package.mkdir()
    (package / "__main__.py").write_text(main)
    (package / "experiment.py").write_text(experiment)
    [sweep] = blocks("yaml", [GUIDE])
    (tmp_path / "sweep.yaml").write_text(sweep)
    (tmp_path / "write_table.py").write_text(write_table)
    runpy.run_path("write_table.py")

    def run(*arguments):
        return run_here(*arguments, cwd=Path.cwd(), module="my_task").stdout

    return run


def r2_of(checkpoint):
    """Return r2 on the last tenth of the table, computed without the package."""
    rows = np.genfromtxt("table.csv", delimiter=",", skip_header=1)
    test = rows[-len(rows) // 10 :]
    x, y = test[:, :-1], test[:, -1]
    w = {name: value.double().numpy() for name, value in weights(checkpoint).items()}
    x = x @ w["network.0.weight"].T - w["network.1.running_mean"]
    x = x / np.sqrt(w["network.1.running_var"] + 1e-5) * w["network.1.weight"]
    x = np.maximum(x + w["network.1.bias"], 0)
    outputs = x @ w["network.3.weight"][0] + w["network.3.bias"]
    return 1 - np.square(outputs - y).sum() / np.square(y - y.mean()).sum()


def test_fit_and_inspect(project):
    out = project("fit", "--trainer.max_epochs", 2, "--model.width", 8, "--data.workers", 1)
    assert "cannot be resumed" not in out and "samples/s" in out
    result = json.loads((RUN / "result.json").read_text())
    found = json.loads(project("inspect", BEST, "--json"))
    validations = [validation["val_r2"] for validation in found["validations"]]
    assert len(validations) == 2
    assert result["val_r2"] == max(validations)
    # In the test there is no noise.
    assert result["test_r2"] == pytest.approx(r2_of(BEST), abs=1e-5)
    settings = found["settings"]
    assert settings["model.width"] == 8 and "data.workers" not in settings
    assert "best validation" in project("inspect", BEST)


@pytest.mark.slow
def test_the_other_commands_run_as_printed(project):
    project("fit", "--trainer.max_epochs", 1)
    short = {"--seeds 5": "--seeds 2", "max_epochs 20": "max_epochs 2"}
    _, lines = blocks("sh", [GUIDE])
    output = {}
    for line in lines.splitlines():
        if "devices" in line:
            continue  # has a test of its own
        for printed, replacement in short.items():
            line = line.replace(printed, replacement)
        name, *arguments = shlex.split(line.removeprefix("python -m my_task "))
        if name == "compare":
            arguments += ["--trainer.max_epochs", "1"]
        if name == "sweep":
            arguments += ["--trainer.max_epochs", "1", "--trials", "2"]
        output[name] = project(name, *arguments)
    assert "Resuming from step 38 " in output["fit"]

    table = json.loads(Path("runs/compare/table.json").read_text())
    keys = [(run["choice"], run["seed"]) for run in table["runs"]]
    assert keys == [(f"width={width}", seed) for seed in (0, 1) for width in (4, 32)]
    assert "vs width=4 (95%)" in output["compare"]
    for run in table["runs"]:
        best = Path(run["folder"], "checkpoints/best.ckpt")
        assert run["test r2"] == pytest.approx(r2_of(best), abs=1e-5)

    trials = list(csv.DictReader(Path("runs/sweep/trials.csv").read_text().splitlines()))
    assert len(trials) == 2
    first, second = (float(trial["val_r2"]) for trial in trials)
    # The best trial is the first row.
    assert first >= second

    assert f"test r2 {r2_of(BEST):.4f}" in output["export"]
    inputs = torch.rand(5, 3)
    exported = torch.export.load("model.pt2").module()(inputs)
    assert exported.shape == (5,)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically_with_another_number_of_workers(project, tmp_path):
    settings = ("fit", "--trainer.max_epochs", 3, "--checkpoint.every_n_train_steps", 1)
    project(*settings, "--data.workers", 0)
    expected = kills.outcome(RUN)
    RUN.parent.rename("uninterrupted")

    run = start(*settings, "--data.workers", 2, cwd=tmp_path, module="my_task")
    while position()[0] < 50:
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    step, batch = position()
    assert batch > 0 and step < 3 * 38, "the run was not killed in the middle of an epoch"
    assert f"Resuming from step {step} " in project("fit", "--resume", RUN, "--data.workers", 3)
    assert not list(kills.differences(expected, kills.outcome(RUN)))


def position():
    """Return the step of last.ckpt, and the number of batches in its epoch."""
    if not LAST.exists():
        return 0, 0
    checkpoint = torch.load(LAST, weights_only=True)
    return checkpoint["global_step"], checkpoint["between_steps"]["batch"]


@pytest.mark.slow
def test_two_processes_train_like_one(project, tmp_path):
    [printed] = [line for line in "".join(blocks("sh", [GUIDE])).splitlines() if "devices" in line]
    several = shlex.split(printed.partition(" fit ")[2])
    # 2,400 rows in batches of 65 leave 60, and a batch has two shards of different sizes.
    settings = ("--trainer.precision", "64-true", "--data.batch_size", 65)
    settings = ("fit", "--trainer.max_epochs", 2, *settings)
    project(*settings, "--data.workers", 0)
    expected = weights(LAST)
    RUN.parent.rename("one")
    command(*settings, *several, cwd=tmp_path, module="my_task")
    found = weights(LAST)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
    one, two = (json.loads(Path(run, "result.json").read_text()) for run in ("one/0", RUN))
    assert two["processes"] == 2
    for name in ("train_loss", "train_r2", "val_r2", "test_r2"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name  # metrics are float32
