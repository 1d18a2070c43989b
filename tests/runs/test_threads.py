"""CPU threads of a run, and the cores that other processes use."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from bn_lightning.runs.threads import OtherProcesses
from tests.conftest import BRIEF, command, run_here

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the use of cores")
ONE_STEP = (*BRIEF, "--trainer.max_steps", 1)


@pytest.fixture
def threads(monkeypatch):
    """Return a function that sets the number of threads, which is restored after the test."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield torch.set_num_threads
    torch.set_num_threads(before)


def saved_threads(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint["between_steps"]["surroundings"]["threads"]


def test_a_run_has_the_threads_of_its_setting(tmp_path, threads):
    run_here("fit", *ONE_STEP, "--threads", 3, cwd=tmp_path)
    assert saved_threads(tmp_path / "runs/lenet/0") == 3
    threads(1)
    run_here("fit", "--resume", "runs/lenet/0", "--trainer.max_steps", 2, cwd=tmp_path)
    assert saved_threads(tmp_path / "runs/lenet/0") == 3


@pytest.mark.slow
def test_each_process_has_the_threads_of_the_setting(tmp_path):
    command("fit", *ONE_STEP, "--threads", 3, "--trainer.devices", 2, cwd=tmp_path)
    assert saved_threads(tmp_path / "runs/lenet/0") == 2 * 3


@pytest.mark.parametrize("count", [0, -1, "many"])
def test_an_invalid_number_of_threads_is_refused(main, count):
    code, _, err = main("fit", *ONE_STEP, "--threads", count)
    assert code == 2 and "threads" in err and "Traceback" not in err


@linux
def test_a_busy_machine_is_noted(threads):
    cores = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(cores)]
    try:
        others = OtherProcesses()
        # The loops get at least a third of the cores, whatever else runs.
        time.sleep(1)
        assert cores / 3 < others.cores() <= 1.1 * cores
        threads(cores + 1)
        [note] = others.notes()
        assert re.search(rf"use \d+\.\d of {cores} CPU cores", note) and "--threads 1" in note
        threads(1)
        assert others.notes() == []
    finally:
        for process in busy:
            process.kill()
            process.wait()


@linux
def test_the_time_of_this_process_is_not_counted(threads):
    others, end = OtherProcesses(), time.process_time() + 0.5
    while time.process_time() < end:
        pass
    cores, this = len(os.sched_getaffinity(0)), 0.5 / (time.monotonic() - others._before[0])
    assert others.cores() <= cores - this + 0.1
