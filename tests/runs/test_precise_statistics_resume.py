"""A run with precise statistics that was stopped and resumed is equal to an uninterrupted run."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import BRIEF, REPOSITORY, run_here
from tests.support import kills
from tests.support.runs import begin, content_of, posix, result_of, wait_until_it_trains

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

PRECISE = ("--precise_statistics", 3)
RESUMED = (
    *(*BRIEF, "--monitor", "false", *PRECISE),
    *("--trainer.val_check_interval", "0.5", "--data.flip", "true"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 3 epochs. No test may change it."""
    cwd = tmp_path_factory.mktemp("whole")
    run_here("fit", *RESUMED, "--trainer.max_epochs", 3, cwd=cwd)
    return cwd / "runs/lenet/0"


@pytest.mark.parametrize(
    ("ends", "continues"),
    [
        pytest.param(("max_steps", 7), ("max_steps", -1), id="within an epoch"),
        pytest.param(("max_steps", 6), ("max_steps", -1), id="validation", marks=pytest.mark.slow),
        pytest.param(
            ("max_epochs", 2), ("max_epochs", 3), id="more epochs", marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_ended_earlier_is_resumed_bit_identically(
    main, whole, tmp_path, ends, continues
):
    given = (*RESUMED, "--trainer.max_epochs", 3)
    assert main("fit", *given, f"--trainer.{ends[0]}", ends[1])[0] == 0
    folder = tmp_path / "runs/lenet/0"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["precise_statistics"]
    assert main("fit", "--resume", folder, f"--trainer.{continues[0]}", continues[1])[0] == 0
    one, other = map(kills.outcome, (whole, folder))
    assert one["precise_statistics"]
    # The means that were logged at the end of the incomplete epoch differ.
    means = ("/curves/train_loss_epoch", "/curves/train_acc", "/curves/epoch", "/curves/test")
    assert [it for it in kills.differences(one, other) if not it.startswith(means)] == []


def test_a_finished_run_that_is_resumed_changes_nothing(main, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs/lenet/0")
    folder = tmp_path / "runs/lenet/0"
    before = result_of(folder), content_of(folder / "checkpoints")
    code, _, err = main("fit", "--resume", folder)
    assert code == 0, err
    assert content_of(folder / "checkpoints") == before[1]
    for name in ("test_acc", "test_loss", "val_acc", "tested"):
        assert result_of(folder)[name] == before[0][name], name


@pytest.mark.slow
@pytest.mark.timeout(900)  # several runs
def test_killed_runs_resume_bit_identically(tmp_path):
    command = [sys.executable, "-m", "tests.support.kills", "--kills", "1", "--writing", "1"]
    done = subprocess.run(
        [*command, "--folder", tmp_path, "--precise_statistics", "3"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@posix
@pytest.mark.slow
def test_a_run_that_sigterm_stopped_at_any_time_is_resumed_bit_identically(tmp_path):
    """The second run is stopped three times, after more and more steps."""
    settings = (*PRECISE, "--trainer.max_epochs", 12, "--trainer.val_check_interval", "0.5")
    settings += ("--data.batch_size", 100, "--data.flip", "true", "--monitor", "false")
    run_here("fit", "--data.source", "sample", *settings, "--name", "whole", cwd=tmp_path)
    truth = kills.outcome(tmp_path / "runs/whole/0")
    run = begin(tmp_path, *settings)
    for delay in (0.1, 0.35, 0.6):
        wait_until_it_trains(run, tmp_path)
        time.sleep(delay)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 128 + signal.SIGTERM, out + err
        run = begin(tmp_path, *settings, "--ckpt_path", "last")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, out + err
    found = kills.outcome(tmp_path / "runs/lenet/0")
    assert found["precise_statistics"]
    assert result_of(tmp_path / "runs/lenet/0")["resumed_at_steps"].count(",") == 2
    assert list(kills.differences(truth, found)) == []
