"""Worker processes: same results as single runs, progress, failures and data reuse."""

import json
import multiprocessing
import sys

import pytest
import yaml

from bn_lightning.data import sources
from bn_lightning.errors import RunFailed
from bn_lightning.runs import process, run
from bn_lightning.studies import worker_process, workers
from bn_lightning.studies.workers import MachineFailure, Workers
from tests.conftest import assert_same_weights, run_here

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"
ALONE = ("--data.source", "sample", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
QUICK = (*ALONE, "--monitor", "false")


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """The current folder of the tests in this module, and of their worker."""
    folder = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        # A worker must not import it.
        (folder / "torch.py").write_text("raise SystemExit('from the current folder')\n")
        yield folder


@pytest.fixture(scope="module")
def pool(cwd):
    """One worker, shared by all tests. A test must not depend on earlier runs of the worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.terminal, "_program", "python -m shoes")
        with Workers(EXPERIMENT, 1, 1) as started:
            yield started


def keep_running(progress):
    return True


def test_a_run_in_a_worker_is_bit_identical_to_a_single_run(pool, cwd, tmp_path):
    settings = ("--model.norm", "none", "--seed_everything")
    log = cwd / "warm/log.txt"
    pool.fit([*QUICK, *settings, "0", "--name", "warm"], log, keep_running)
    folder = pool.fit([*QUICK, *settings, "1", "--name", "warm"], log, keep_running)
    assert folder.as_posix() == "runs/warm/1"
    assert yaml.safe_load((folder / "config.yaml").read_text())["monitor"] is False
    # The log contains the output of both runs.
    assert log.read_text().count("results are in runs/warm/") == 2

    run_here("fit", *ALONE, *settings, "1", cwd=tmp_path)
    for name in ("best.ckpt", "last.ckpt"):
        alone = tmp_path / "runs/lenet/0/checkpoints" / name
        assert_same_weights(folder / "checkpoints" / name, alone)


def test_progress_contains_the_selected_metric_of_each_validation(pool, cwd):
    seen = []

    def note(progress):
        seen.append(progress)
        return True

    settings = (*QUICK, "--trainer.max_epochs", "2", "--trainer.val_check_interval", "11")
    folder = pool.fit([*settings, "--name", "progress"], cwd / "log.txt", note)
    # Each epoch reports two validations and its end.
    assert [progress.fraction for progress in seen] == [0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
    assert [len(progress.selected) for progress in seen] == [1, 2, 2, 3, 4, 4]
    result = json.loads((folder / "result.json").read_text())
    assert seen[-1].selected[-1] == result["val_acc_final"]
    assert max(seen[-1].selected) == result["val_acc_best"]


def test_the_parent_can_end_a_run(pool, cwd):
    settings = (*QUICK, "--trainer.max_epochs", "9", "--name", "ended")
    folder = pool.fit(settings, cwd / "log.txt", lambda progress: progress.fraction < 0.2)
    result = json.loads((folder / "result.json").read_text())
    assert result["finished"] and result["epochs"] == 2


def test_a_worker_survives_a_failed_run(pool, cwd):
    worker = pool._workers[-1]
    with pytest.raises(RunFailed, match="All settings: python -m shoes fit --help"):
        pool.fit([*QUICK, "--model.lrr", "1"], cwd / "log.txt", keep_running)
    with pytest.raises(RunFailed, match="cannot be imported"):
        pool.fit([*QUICK, "--model.norm", "no.module"], cwd / "log.txt", keep_running)
    assert "error: The norm 'no.module'" in (cwd / "log.txt").read_text()
    assert pool._workers[-1] is worker and worker.process.is_alive()


def test_a_dead_worker_is_replaced(pool, cwd):
    (cwd / "exiting.py").write_text("import os\n\ndef norm(**_):\n    os._exit(3)\n")
    with pytest.raises(MachineFailure, match=r"The worker process died \(exit code 3\)"):
        pool.fit([*QUICK, "--model.norm", "exiting.norm"], cwd / "log.txt", keep_running)

    def fail(progress):
        raise ZeroDivisionError

    # An exception in the parent kills the worker too.
    with pytest.raises(ZeroDivisionError):
        pool.fit([*QUICK, "--name", "failing"], cwd / "log.txt", fail)
    assert len(pool._workers) == 3
    folder = pool.fit([*QUICK, "--name", "after"], cwd / "log.txt", keep_running)
    assert json.loads((folder / "result.json").read_text())["finished"]


METHOD = """\
import multiprocessing

def norm(**_):
    raise RuntimeError(multiprocessing.get_start_method())
"""


def test_the_workers_of_a_loader_start_as_in_a_single_run(pool, cwd):
    (cwd / "method.py").write_text(METHOD)
    with pytest.raises(RunFailed, match=f": {multiprocessing.get_start_method()}$"):
        pool.fit([*QUICK, "--model.norm", "method.norm"], cwd / "log.txt", keep_running)


def test_runs_of_the_same_process_read_the_same_data_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    process.set_up()
    roots = []
    load = sources.load

    def loading(source, root, *args, **kwargs):
        roots.append(str(root))
        return load(source, root, *args, **kwargs)

    monkeypatch.setattr(sources, "load", loading)
    monkeypatch.setattr(worker_process._WarmCLI, "_earlier", worker_process.deque(maxlen=4))
    modules = []
    for root in ("a", "a", "b", "a"):
        arguments = ["fit", *QUICK, "--trainer.limit_train_batches", "2", "--data.root", root]
        modules.append(run.command_line(arguments, EXPERIMENT, worker_process._WarmCLI).datamodule)
        worker_process._WarmCLI.release_trainers()
    assert roots == ["a", "b"]
    # The networks of earlier runs can be freed.
    assert all(module.trainer is None for module in modules)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 3, "accumulate_grad_batches": 4}, 9),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": -1}, float("inf")),
        ({"max_epochs": 3, "num_training_batches": float("inf")}, float("inf")),
    ],
)
def test_the_planned_number_of_steps(settings, steps):
    class Trainer:
        max_steps, num_training_batches, accumulate_grad_batches = -1, 10, 1

    trainer = Trainer()
    vars(trainer).update(settings)
    assert worker_process._planned_steps(trainer) == steps


BROKEN = """\
def disk(**_):
    raise OSError(28, "No space left on device")

def memory(**_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

def mistake(**_):
    raise RuntimeError("a mistake in the layer")
"""


@pytest.mark.parametrize(
    ("norm", "log", "kind", "is_disk_full"),
    [
        ("none", "/dev/full", MachineFailure, True),
        ("broken.disk", "log.txt", MachineFailure, True),
        ("broken.memory", "log.txt", MachineFailure, False),
        ("broken.mistake", "log.txt", RunFailed, False),
    ],
)
def test_failures_of_the_machine_are_distinguished(pool, cwd, norm, log, kind, is_disk_full):
    (cwd / "broken.py").write_text(BROKEN)
    with pytest.raises(RunFailed) as caught:
        pool.fit([*QUICK, "--model.norm", norm, "--name", "broken"], cwd / log, keep_running)
    assert type(caught.value) is kind
    assert getattr(caught.value, "is_disk_full", False) == is_disk_full
    assert "\n" not in str(caught.value)
