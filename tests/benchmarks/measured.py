"""Helpers that several benchmarks share. This module is not a command."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def result(*settings: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `fit` on all 60,000 images in a new process, and return its result.json.

    The folder of the run is deleted.
    """
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "bn_lightning", "fit", "--data.val_images", "0", *settings]
        command += ["--trainer.default_root_dir", runs, "--name", "measured"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(Path(runs, "measured", "0", "result.json").read_text()))


def images_per_second(*settings: str, environment: dict[str, str] | None = None) -> float:
    """Run `fit` like `result`, and return its training speed."""
    return float(result(*settings, environment=environment)["images_per_second"])


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """Return a wrapper of the function that adds the seconds of each call to `spent[name]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return call
