"""Runs in processes of their own, and what a run leaves."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import QUICK

# Signals as POSIX has them.
posix = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")


def result_of(folder):
    """Return the result.json of a run."""
    return json.loads((folder / "result.json").read_text())


def content_of(folder):
    """Return the bytes of each file of a run."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def begin(cwd, *settings, environment=None):
    """Start `fit` with 100 epochs in a process of its own."""
    settings = (*QUICK, "--trainer.max_epochs", 100, "--trainer.accelerator", "cpu", *settings)
    return subprocess.Popen(
        [sys.executable, "-m", "bn_lightning", "fit", *map(str, settings)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | (environment or {}),
    )


def wait_until_it_trains(run, cwd):
    """Wait until a checkpoint of a later step than the first was written."""
    last, end = cwd / "runs/lenet/0/checkpoints/last.ckpt", time.monotonic() + 60
    first = None
    while first is None or last.stat().st_mtime_ns == first:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "it does not train"
        time.sleep(0.01)
        if last.exists() and first is None:
            first = last.stat().st_mtime_ns


def in_namespaces(which, script, cwd, timeout=120):
    """Run a shell script in Linux namespaces of its own; without any the test is skipped."""
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
