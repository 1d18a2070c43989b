"""A run that was stopped goes on as if it had not been; tests/support/kills.py does the same to many more."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import lightning.pytorch as pl
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_lightning import Classifier, ExactResume, FashionMNIST, WholeCheckpointIO
from tests.conftest import QUICK, REPOSITORY, needs_all_images
from tests.support import kills

SWA = ("--trainer.callbacks+=bn_lightning.StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.05",
       "--trainer.callbacks.swa_epoch_start", "1")  # fmt: skip
PLATEAU = ("--model.scheduler", "ReduceLROnPlateau", "--model.scheduler_args.patience", "0",
           "--model.scheduler_args.threshold", "0.5")  # fmt: skip
COSINE = ("--model.scheduler", "CosineAnnealingLR", "--model.optimizer_args.momentum", "0.9", "--model.lr", "0.1")


def fails_at(step):
    """A norm in a file of its own that stops the process in the forward pass of that step, once."""
    return (
        "import pathlib\nfrom bn_lightning import BatchNorm\n\n\nclass Norm(BatchNorm):\n    calls = 0\n\n"
        "    def forward(self, x):\n        Norm.calls += self.training\n"
        f"        if Norm.calls == 4 * {step} and not pathlib.Path('failed').exists():\n"
        "            pathlib.Path('failed').touch()\n            raise RuntimeError('planted')\n"
        "        return super().forward(x)\n"
    )


@pytest.mark.parametrize(
    ("settings", "step"),
    [((), 30), ((), 44), ((), 45), (SWA, 30), (SWA, 45), (PLATEAU, 44), (COSINE, 30)],  # an epoch has 22 steps
    ids=["plain", "last step", "first step", "averaged", "averaged, first step", "plateau, last step", "cosine"],
)
def test_what_fails_within_an_epoch_goes_on_exactly(main, tmp_path, monkeypatch, settings, step):
    settings = (*QUICK, "--trainer.max_epochs", 3, "--checkpoint.every_n_train_steps", 4, *settings)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "planted.py").write_text(fails_at(step))
    (tmp_path / "failed").touch()
    norm = ("--model.norm", "planted.Norm")
    assert main("fit", *settings, *norm, "--name", "whole")[0] == 0
    truth = kills.outcome(tmp_path / "runs/whole/0")
    (tmp_path / "failed").unlink()
    sys.modules["planted"].Norm.calls = 0
    with pytest.raises(RuntimeError, match="planted"):
        main("fit", *settings, *norm)
    assert main("fit", *settings, *norm, "--ckpt_path", "last")[0] == 0
    sys.modules.pop("planted")
    assert list(kills.differences(truth, kills.outcome(tmp_path / "runs/lenet/0"))) == []
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    at = int(json.loads((tmp_path / "runs/lenet/0/result.json").read_text())["resumed_at_steps"])
    assert step - 5 <= at < step


def test_a_run_that_max_steps_ended_within_an_epoch_goes_on_there(main, tmp_path):
    assert main("fit", *QUICK, "--name", "whole")[0] == 0
    assert main("fit", *QUICK, "--trainer.max_steps", 30)[0] == 0
    code, out, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert code == 0, err
    assert "goes on after step 30" in out
    assert "changed: --trainer.max_steps -1, which was 30" in out
    one, other = (kills.outcome(tmp_path / f"runs/{name}/0") for name in ("whole", "lenet"))
    # But for the means that were logged when the epoch was cut short.
    means = ("/curves/train_loss_epoch", "/curves/train_acc", "/curves/epoch")
    assert [found for found in kills.differences(one, other) if not found.startswith(means)] == []
    folder = tmp_path / "runs/lenet/0"
    assert yaml.safe_load((folder / "resumed-1.yaml").read_text()) == {"trainer": {"max_steps": -1}}
    before = (folder / "config.yaml").read_text()
    assert "max_steps: 30" in before
    code, out, err = main("fit", "--resume", "runs/lenet/0")  # finished: nothing is changed, and it says the same again
    assert code == 0, err
    assert "changed" not in out and not (folder / "resumed-2.yaml").exists()
    assert list(kills.differences(kills.outcome(folder), other)) == []


def test_early_stopping_stays_stopped(main, tmp_path):
    stops = ("--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val_acc",
             "--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", 1)  # fmt: skip
    assert main("fit", *QUICK, *stops, "--trainer.max_epochs", 5, "--trainer.limit_train_batches", 3)[0] == 0
    result = (tmp_path / "runs/lenet/0/result.json").read_text()
    epochs = json.loads(result)["epochs"]
    assert epochs < 5
    assert main("fit", "--resume", "runs/lenet/0")[0] == 0
    again = json.loads((tmp_path / "runs/lenet/0/result.json").read_text())
    assert again["epochs"] == epochs


def test_a_moved_folder_keeps_its_best(main, trained, tmp_path):
    """The best of the first epochs is still known elsewhere, and a worse one does not take its place."""
    assert main("fit", *QUICK)[0] == 0
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    best = tmp_path / "moved/lenet/0/checkpoints/best.ckpt"
    before = best.read_bytes()
    spoil = ("--model.lr", "100", "--trainer.max_epochs", 3, "--trainer.limit_train_batches", 3)
    code, out, err = main("fit", "--resume", "moved/lenet/0", *spoil)
    assert code == 0, err
    assert best.read_bytes() == before
    assert "tested best.ckpt of moved/lenet/0" in out
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def stopped(main, tmp_path):
    """The folder of a run that has stopped within its second epoch, and how to tell whether it is untouched."""
    assert main("fit", *QUICK, *COSINE, "--trainer.max_steps", 30)[0] == 0
    folder = tmp_path / "runs/lenet/0"

    def content():
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return folder, content


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--seed_everything", 1), "--seed_everything was 0 when the run began and is now 1"),
        (("--data.val_images", 100), "--data.val_images was 5000"),
        (("--data.batch_size", 128), "--data.batch_size was 256"),
        (("--model.norm", "none"), "does not fit the network"),
        (("--trainer.max_steps", 40), "CosineAnnealingLR was planned for 30 steps"),
        (("--ckpt_path", "last"), "--resume and --ckpt_path are both given"),
        (("--trainer.fast_dev_run", "true"), "--resume goes on with a run for good"),
        pytest.param(("--data.source", "system"), "was trained on other data", marks=needs_all_images),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_would_make_it_another_run_is_refused_and_nothing_is_touched(main, stopped, settings, said):
    _, content = stopped
    before = content()
    code, _, err = main("fit", "--resume", "runs/lenet/0", *settings)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert content() == before


def test_between_epochs_the_size_of_a_batch_may_change_and_that_is_said(main, tmp_path):
    assert main("fit", *QUICK)[0] == 0
    code, out, err = main("fit", "--resume", "runs/lenet/0", "--data.batch_size", 500, "--trainer.max_epochs", 3)
    assert code == 0, err
    assert "changed: --data.batch_size 500, which was 256" in out
    assert json.loads((tmp_path / "runs/lenet/0/result.json").read_text())["steps"] == 44 + 11


def test_a_run_goes_on_in_one_process_only(main, stopped):
    folder, content = stopped
    before = content()
    with filelock.FileLock(folder / ".lock"):
        code, _, err = main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)
    assert (code, "is under way in another process" in err) == (2, True)
    assert content() == before


def test_a_torn_checkpoint_is_passed_over_by_name(main, stopped):
    folder, _ = stopped
    last = folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-1_000])
    code, out, err = main("fit", *QUICK, *COSINE, "--trainer.max_steps", 30, "--ckpt_path", "last")
    assert code == 0, err
    assert f"{last.relative_to(Path.cwd())} is passed over, it is torn" in err
    assert "goes on after step 22, from runs/lenet/0/checkpoints/best.ckpt" in out
    assert torch.load(last, weights_only=True)["global_step"] == 30
    # best.ckpt is of the end of the first epoch, whose figures are not to run into the second's.
    assert main("fit", *QUICK, *COSINE, "--trainer.max_steps", 30, "--name", "whole")[0] == 0
    results = [json.loads(Path(f"runs/{name}/0/result.json").read_text()) for name in ("lenet", "whole")]
    assert results[0]["train_acc"] == results[1]["train_acc"]


def test_the_first_time_there_is_no_last(main, tmp_path):
    code, out, _ = main("fit", *QUICK, "--trainer.limit_train_batches", 2, "--ckpt_path", "last")
    assert code == 0
    assert "There is no checkpoint in 'runs/lenet' yet: a new run begins." in out
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]


@pytest.mark.parametrize(("folder", "said"), [("nowhere", "no config.yaml"), ("empty", "no whole checkpoint")])
def test_resume_of_what_is_no_run(main, tmp_path, folder, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").touch()
    code, _, err = main("fit", "--resume", folder)
    assert code == 2
    assert said in err


def test_a_checkpoint_of_another_version_is_for_testing_only(main, stopped):
    folder, _ = stopped
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    del checkpoint["train_metrics"]
    torch.save(checkpoint, "old.ckpt")
    code, _, err = main("fit", "--ckpt_path", "old.ckpt")
    assert (code, "'old.ckpt' was written by another version" in err) == (2, True)
    assert main("test", "--ckpt_path", "old.ckpt")[0] == 0


def test_max_time_stops_within_an_epoch_and_tests_what_there_is(main, tmp_path):
    assert main("fit", *QUICK, "--name", "whole")[0] == 0
    code, out, err = main("fit", *QUICK, "--trainer.max_time", {"milliseconds": 250}.__repr__())
    assert code == 0, err
    assert "stopped by --trainer.max_time after step" in out
    assert "test acc" in out
    assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_time", "null")[0] == 0
    one, other = (kills.outcome(tmp_path / f"runs/{name}/0") for name in ("whole", "lenet"))
    del one["curves"]["test_acc"], other["curves"]["test_acc"]
    assert list(kills.differences(one, other)) == []


class Bad(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 29:
            pl_module.network.fc3.weight.data.fill_(float("inf"))


def test_a_loss_that_is_no_number_ends_the_run_before_a_checkpoint_has_it(main, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bad.py").write_text(f"from {__name__} import Bad as Bad\n")
    code, _, err = main("fit", *QUICK, "--checkpoint.every_n_train_steps", 4, "--trainer.callbacks+=bad.Bad")
    assert code == 1
    assert "The loss is nan in step 31: epoch 2, batch 9 of it." in err
    assert "The last good checkpoint is of step 28" in err
    assert "Traceback" not in err
    failure = json.loads((tmp_path / "runs/lenet/0/failure.json").read_text())
    data = FashionMNIST("sample")
    data.prepare_data()
    data.setup("fit")
    assert failure["images"] == data.train_order(1)[8 * 256 : 9 * 256].tolist()
    state = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 28
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_two_lines_of_python_are_enough(tmp_path):
    """The same without the command line: a run that is cut by an exception goes on from last.ckpt."""

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 31:
                raise InterruptedError

    def fit(where, *callbacks, ckpt_path=None):
        pl.seed_everything(0)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=tmp_path / where, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*callbacks, ExactResume(every_n_train_steps=10)],
            plugins=[WholeCheckpointIO()],
        )  # fmt: skip
        trainer.fit(Classifier(), FashionMNIST("sample", flip=True), ckpt_path=ckpt_path, weights_only=True)
        return torch.load(tmp_path / where / "checkpoints/last.ckpt", weights_only=True)

    truth = fit("whole")
    with pytest.raises(InterruptedError):
        fit("cut", Cut())
    again = fit("cut", ckpt_path=tmp_path / "cut/checkpoints/last.ckpt")
    for name in ("state_dict", "optimizer_states", "global_step"):
        assert list(kills.differences(truth[name], again[name])) == []


def test_no_step_is_in_the_curves_twice_or_missing(main, tmp_path):
    every = (*QUICK, "--trainer.log_every_n_steps", 1)
    assert main("fit", *every, "--trainer.max_steps", 30)[0] == 0
    assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", 12)[0] == 0  # nothing left to do
    assert main("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", -1)[0] == 0
    events = EventAccumulator(str(tmp_path / "runs/lenet/0"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(44))


# Real processes


def begin(cwd, *settings, environment=None):
    settings = map(str, (*QUICK, "--trainer.max_epochs", 100, "--trainer.accelerator", "cpu", *settings))
    return subprocess.Popen(
        [sys.executable, "-m", "bn_lightning", "fit", *settings], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ | (environment or {}),
    )  # fmt: skip


def wait_until_it_trains(run, cwd):
    """Until a checkpoint of a later step than the first has been written."""
    last, end = cwd / "runs/lenet/0/checkpoints/last.ckpt", time.monotonic() + 60
    first = None
    while first is None or last.stat().st_mtime_ns == first:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "it does not train"
        time.sleep(0.01)
        if last.exists() and first is None:
            first = last.stat().st_mtime_ns


posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals as POSIX has them")


@posix
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number, processes):
    run = begin(tmp_path, "--trainer.devices", processes)
    wait_until_it_trains(run, tmp_path)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, out + err
    assert "go on with: python -m bn_lightning fit --resume runs/lenet/0" in out
    assert "Traceback" not in err and "terminate called" not in err
    last = torch.load(tmp_path / "runs/lenet/0/checkpoints/last.ckpt", weights_only=True)
    assert f"stopped by {number.name} after step {last['global_step']:,};" in out
    result = json.loads((tmp_path / "runs/lenet/0/result.json").read_text())
    assert (result["finished"], result["steps"], result["test_acc"]) == (False, last["global_step"], None)


@posix
def test_a_second_signal_stops_at_once(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time, pathlib, lightning.pytorch as pl\n\n\nclass Slow(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n        if trainer.global_step == 25:\n"
        "            pathlib.Path('sleeps').touch()\n            end = time.monotonic() + 30\n"
        "            while time.monotonic() < end:\n                time.sleep(0.1)\n"
    )
    run = begin(tmp_path, "--trainer.callbacks+=slow.Slow")
    while not (tmp_path / "sleeps").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None  # in the middle of a step
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=10)
    assert run.returncode == 130


@posix
def test_slurm_takes_the_job_away_and_gives_it_again(tmp_path):
    """SLURM's signal saves between two steps, and the job is put into the queue again; scontrol is a script here."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1",
             "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}  # fmt: skip
    run = begin(tmp_path, environment=slurm)
    wait_until_it_trains(run, tmp_path)
    run.send_signal(signal.SIGUSR1)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert "stopped by SIGUSR1" in out
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_two_runs_that_begin_at_the_same_moment(tmp_path):
    runs = [begin(tmp_path, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2) for _ in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    for folder in ("0", "1"):
        assert json.loads((tmp_path / "runs/lenet" / folder / "result.json").read_text())["finished"]
        assert len(list((tmp_path / "runs/lenet" / folder).glob("events*"))) == 1


def test_a_full_disk_ends_the_run_with_one_message_and_the_checkpoint_before(tmp_path):
    """A disk of 4 MB that something else fills while the run goes on."""
    (tmp_path / "runs").mkdir()
    code = (
        "import lightning.pytorch as pl\n\n\nclass Fill(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n        if trainer.global_step == 25:\n"
        "            with open('runs/filler', 'wb', buffering=0) as file:\n                try:\n"
        "                    while file.write(bytes(4096)):\n                        pass\n"
        "                except OSError:\n                    pass\n"
    )
    (tmp_path / "fill.py").write_text(code)
    script = (
        f"mount -t tmpfs -o size=4m none runs && {sys.executable} -m bn_lightning fit {' '.join(QUICK)} "
        "--checkpoint.every_n_train_steps 10 --trainer.accelerator cpu --trainer.callbacks+=fill.Fill; code=$?; "
        "cp -r runs kept; exit $code"
    )
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot be written: No space left on device" in done.stderr
    assert "The one before is whole" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoints = tmp_path / "kept/lenet/0/checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 22
    assert not list(checkpoints.glob(".*"))


@pytest.mark.parametrize(("options", "said"), [("ro", "Read-only file system"), ("size=4k", "No space left on device")])
def test_no_room_for_a_run(tmp_path, options, said):
    (tmp_path / "runs").mkdir()
    script = f"mount -t tmpfs -o {options} none runs && {sys.executable} -m bn_lightning fit {' '.join(QUICK)}"
    done = in_namespaces(("--mount",), script, tmp_path)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_gone_ends_the_run(tmp_path):
    run = begin(tmp_path)
    wait_until_it_trains(run, tmp_path)
    shutil.move(tmp_path / "runs/lenet/0", tmp_path / "elsewhere")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1, out + err
    assert re.search("cannot (be written|go on): .*No such file or directory", err)
    assert "Traceback" not in err
    assert torch.load(tmp_path / "elsewhere/checkpoints/last.ckpt", weights_only=True)["global_step"]


def in_namespaces(which, script, cwd, timeout=120):
    unshare = ["unshare", *which, "sh", "-c"]
    try:
        possible = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip(f"needs namespaces ({' '.join(which)}; Linux, root)")
    return subprocess.run([*unshare, script], cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills(tmp_path, processes):
    command = [sys.executable, "-m", "tests.support.kills", "--kills", "3", "--writing", "2", "--folder", tmp_path]
    done = subprocess.run([*command, "--processes", str(processes)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
