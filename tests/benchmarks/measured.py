"""What several of these benchmarks measure with; no command of its own."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def result(*settings: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Of `fit` with these settings, on all 60,000 images, in a process of its own; it leaves no folder of a run."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "bn_lightning", "fit", "--data.val_images", "0", *settings]
        command += ["--trainer.default_root_dir", runs, "--name", "measured"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(Path(runs, "measured", "0", "result.json").read_text()))


def images_per_second(*settings: str, environment: dict[str, str] | None = None) -> float:
    """The speed of that `fit`."""
    return float(result(*settings, environment=environment)["images_per_second"])


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, which adds the seconds that each call takes to `spent[name]`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begun

    return call
