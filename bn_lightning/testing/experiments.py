"""What the tests of data and tasks share: an experiment, its objects, and its commands."""

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from bn_lightning.runs import experiment, run
from bn_lightning.testing.failures import fail

# Seconds. The runs of the tests take seconds.
TIMEOUT = 600


class ExperimentTests:
    """Base class of tests of an experiment.

    Attributes:
        experiment: the string in `__main__.py`, `package.module:NAME`.
        settings: flags of `fit` that all tests use, for example
            `("--data.source", "sample")`.
    """

    experiment: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(cls, *flags: str) -> run.CLI:
        """Return the task, the data module and the trainer of `fit`, which does not train."""
        arguments = ["fit", *cls.settings, "--trainer.accelerator", "cpu", *flags]
        return run.command_line(arguments, cls.experiment, run.Rehearsal)

    @classmethod
    def run(cls, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the project, `python -m PACKAGE`, in a folder and in its own process."""
        command = [sys.executable, "-m", experiment.package_of(cls.experiment), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            fail(
                f"A run has not ended after {TIMEOUT} seconds: {' '.join(command[1:])}",
                "code that waits, or that only one of several processes executes.",
            )
