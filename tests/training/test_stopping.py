"""Stopping a run by a signal, by SLURM or by the time limit."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from bn_lightning.errors import RunFailed
from bn_lightning.training import stopping
from bn_lightning.training.stopping import Stopped, StopRequests
from tests.benchmarks.photographs import write_photographs
from tests.conftest import BRIEF, run_here
from tests.support.runs import begin, is_running, posix, result_of, wait_until_it_trains


@posix
@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_run_after_the_current_step(tmp_path, number, processes):
    run = begin(tmp_path, "--trainer.devices", processes)
    wait_until_it_trains(run, tmp_path)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert_saved(tmp_path, number, run.returncode, out, err)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_run(tmp_path, number):
    """A terminal sends SIGINT to all processes of the run."""
    write_photographs(tmp_path / "pictures", 200, width=60, height=45)
    folder = ("--data.source", "auto", "--data.dataset", "folder", "--data.workers", 2)
    path = ("--data.dataset_args.path", "pictures", "--data.resize", 28, "--data.batch_size", 20)
    every = ("--checkpoint.every_n_train_steps", 1)
    run = begin(tmp_path, *folder, *path, "--model.network", "resnet", *every)
    wait_until_it_trains(run, tmp_path)
    workers = wait_for_workers(run.pid)
    if number == signal.SIGKILL:
        run.kill()
    else:
        os.killpg(run.pid, number)
    out, err = run.communicate(timeout=60)
    time.sleep(2 if number == signal.SIGKILL else 0)
    assert not any(map(is_running, workers))
    if number != signal.SIGKILL:
        assert_saved(tmp_path, number, run.returncode, out, err)


def wait_for_workers(pid):
    """Return the ids of two worker processes, which are the children of a run."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if len(found) == 2:
            return found
    raise AssertionError("the run has no workers")


def assert_saved(tmp_path, number, code, out, err):
    """Check the exit code, the output and the folder of a run that a signal stopped."""
    assert code == 128 + number, out + err
    assert "resume with: python -m bn_lightning fit --resume runs/lenet/0" in out
    assert "Traceback" not in err and "terminate called" not in err
    last = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    step = last["global_step"]
    assert f"Stopped by {number.name} after step {step:,}; progress is saved in" in out
    result = result_of(tmp_path / "runs/lenet/0")
    assert (result["finished"], result["steps"], result["test_acc"]) == (False, step, None)


# A callback that sends a signal to its own process after 3 steps.
SENDS = """\
import os
import lightning.pytorch as pl


class Sends(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            os.kill(os.getpid(), {number})
"""


def fit_with_signal(cwd, number):
    """Run fit in this process, which receives a signal."""
    (cwd / "sends.py").write_text(SENDS.format(number=int(number)))
    return run_here("fit", *BRIEF, "--trainer.callbacks+=sends.Sends", cwd=cwd, check=False)


@posix
def test_sigterm_stops_the_run_after_the_current_step(tmp_path):
    done = fit_with_signal(tmp_path, signal.SIGTERM)
    assert_saved(tmp_path, signal.SIGTERM, done.returncode, done.stdout, done.stderr)


@posix
def test_a_second_signal_stops_the_run_immediately(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time, pathlib, lightning.pytorch as pl\n\n\nclass Slow(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n        if trainer.global_step == 25:\n"
        "            pathlib.Path('sleeps').touch()\n            end = time.monotonic() + 120\n"
        "            while time.monotonic() < end:\n                time.sleep(0.1)\n"
    )
    run = begin(tmp_path, "--trainer.callbacks+=slow.Slow")
    while not (tmp_path / "sleeps").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None  # within a step
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 130


@posix
def test_slurms_signal_saves_between_two_steps_and_requeues_the_job(tmp_path, monkeypatch):
    """A shell script replaces scontrol."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    scontrol.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS_PER_NODE": "1",
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    done = fit_with_signal(tmp_path, signal.SIGUSR1)
    assert done.returncode == 0, done.stderr
    assert "Stopped by SIGUSR1" in done.stdout
    assert "job 7 was requeued" in done.stderr
    assert (tmp_path / "arguments").read_text() == "requeue 7\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))


@pytest.mark.parametrize(
    ("array", "job"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "5_2")],
)
@pytest.mark.parametrize(
    ("script", "reason"),
    [("echo no permission >&2; exit 3", "no permission"), (None, "No such file or directory")],
)
def test_a_failure_to_requeue_is_reported(
    tmp_path, monkeypatch, capsys, script, reason, array, job
):
    for name, value in {"SLURM_JOB_ID": "7", "PATH": str(tmp_path), **array}.items():
        monkeypatch.setenv(name, value)
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    stopping._requeue()
    printed = capsys.readouterr().err
    assert printed.startswith(f"SLURM job {job} was not requeued: ") and reason in printed


# Stop requests without a run


def trainer_with(world_size=1, device="cpu", rank=0, environment=None):
    strategy = SimpleNamespace(root_device=torch.device(device), cluster_environment=environment)
    return SimpleNamespace(
        world_size=world_size, strategy=strategy, global_step=12, is_global_zero=rank == 0
    )


@pytest.mark.parametrize(
    ("trainer", "batches"),
    [
        (trainer_with(), [*range(25)]),
        (trainer_with(world_size=2), [0, 10, 20]),
        (trainer_with(device="cuda"), [0, 10, 20]),
    ],
)
def test_expensive_checks_are_due_every_ten_steps(trainer, batches):
    assert [n for n in range(25) if stopping.is_check_due(trainer, n)] == batches


def handlers_of(requests, trainer):
    """Begin, and return the new signal handlers. The old ones are installed again."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        requests.begin(trainer, pl.LightningModule())
        return {n: signal.getsignal(n) for n in before}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requests_in_a_trainer(max_time=None):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    requests = StopRequests(max_time)
    return trainer, requests, handlers_of(requests, trainer)


def test_at_first_there_is_no_stop_request():
    trainer, requests, _ = requests_in_a_trainer(max_time="00:01:00:00")
    assert requests.pending(trainer) == 0
    assert not requests.is_out_of_time


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_its_exit_code(number, capsys):
    trainer, requests, handlers = requests_in_a_trainer()
    handlers[number](number, None)
    # The same signal to the process and to its group.
    handlers[number](number, None)
    assert requests.pending(trainer) == number
    with pytest.raises(Stopped) as stopped:
        requests.stop(trainer, "all is saved")
    assert stopped.value.code == 128 + number
    printed = capsys.readouterr().out
    assert printed == f"\nStopped by {number.name} after step 0; all is saved\n"


@pytest.mark.parametrize("reason", [signal.SIGTERM, stopping.OUT_OF_TIME])
def test_the_first_signal_after_another_request_does_not_end_the_process(reason, monkeypatch):
    """The other request comes from another rank or from the time limit."""
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit with {code}"))
    _, requests, handlers = requests_in_a_trainer()
    trainer = trainer_with(world_size=2)
    trainer.strategy.reduce = lambda own, reduce_op: torch.tensor(int(reason))
    assert requests.pending(trainer) == reason
    handlers[signal.SIGINT](signal.SIGINT, None)


def test_begin_discards_the_requests_of_an_earlier_fit():
    trainer, requests, handlers = requests_in_a_trainer()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert requests.pending(trainer) == signal.SIGTERM
    handlers_of(requests, trainer)
    assert requests.pending(trainer) == 0


def test_the_time_limit_counts_from_the_start_of_training(capsys):
    trainer, requests, _ = requests_in_a_trainer(max_time={"milliseconds": 80})
    assert requests.pending(trainer) == 0
    time.sleep(0.1)
    assert requests.pending(trainer) == stopping.OUT_OF_TIME
    assert requests.is_out_of_time
    with pytest.raises(Stopped) as stopped:
        requests.stop(trainer, "all is saved")
    assert stopped.value.code == 0
    assert "Stopped by --trainer.max_time" in capsys.readouterr().out


@pytest.mark.parametrize("error", [Stopped(143), RunFailed("a loss")])
def test_all_ranks_end_and_rank_0_reports_the_reason(error):
    with pytest.raises(type(error)) as raised:
        stopping.end_all_ranks(trainer_with(), error)
    assert raised.value is error
    # On any other code, Lightning's launcher kills rank 0, which may still be writing.
    for environment, code in ((LightningEnvironment(), 0), (TorchElasticEnvironment(), None)):
        with pytest.raises(Stopped) as raised:
            stopping.end_all_ranks(trainer_with(2, rank=1, environment=environment), error)
        own = error.code if isinstance(error, Stopped) else error.exit_code
        assert raised.value.code == (own if code is None else code)
