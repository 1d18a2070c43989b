"""Functions shared by several benchmarks. This module is not a command."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fit_result(*settings: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `fit` in a new process, and return the content of its result.json.

    It trains on all 60,000 images. The run folder is deleted afterwards.
    """
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "bn_lightning", "fit"]
        command += ["--data.val_images", "0", *settings]
        command += ["--trainer.default_root_dir", runs, "--name", "measured"]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
        file = Path(runs, "measured", "0", "result.json")
        return dict(json.loads(file.read_text()))


def images_per_second(*settings: str, environment: dict[str, str] | None = None) -> float:
    """Run `fit` like `fit_result`, and return its training speed."""
    result = fit_result(*settings, environment=environment)
    return float(result["images_per_second"])


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """Wrap a function so that the duration of each call is added to `seconds[name]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return call
