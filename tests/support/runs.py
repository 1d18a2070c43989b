"""Runs in new processes, and the files of a run."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import QUICK, start

posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")


def result_of(folder):
    """Return the result.json of a run."""
    return json.loads((folder / "result.json").read_text())


def content_of(folder):
    """Return the bytes of each file of a run by its relative path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begin(cwd, *settings, environment=None):
    """Start `fit` with 100 epochs in a new process."""
    settings = (*QUICK, "--trainer.max_epochs", 100, *settings)
    return start("fit", *settings, cwd=cwd, environment=environment)


def wait_until_it_trains(run, cwd):
    """Wait until the second checkpoint is written."""
    last, end = cwd / "runs/lenet/0/checkpoints/last.ckpt", time.monotonic() + 60
    first = None
    while first is None or last.stat().st_mtime_ns == first:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "the run does not train"
        time.sleep(0.01)
        if last.exists() and first is None:
            first = last.stat().st_mtime_ns


def is_running(process):
    """Return whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def in_namespaces(which, script, cwd, timeout=120):
    """Run a shell script in new Linux namespaces; skip the test if they are not available."""
    unshare = ["unshare", *which, "sh", "-c"]
    try:
        possible = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip(f"needs namespaces ({' '.join(which)}; Linux, root)")
    return subprocess.run(
        [*unshare, script], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
