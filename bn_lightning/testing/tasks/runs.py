"""The runs that the tests of a task share. Each is made when a test first needs it."""

import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bn_lightning.runs import run
from bn_lightning.testing.experiments import ExperimentTests
from bn_lightning.testing.failures import describe, fail
from bn_lightning.testing.tasks import fitting, outcomes
from bn_lightning.testing.tasks.fitted import Fitted

# Two epochs of four batches. All else is as in the experiment.
BRIEF = (
    *("--trainer.max_epochs", "2", "--trainer.max_steps", "-1", "--trainer.max_time", "null"),
    *("--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "2"),
    *("--trainer.limit_test_batches", "2", "--trainer.val_check_interval", "1.0"),
    *("--trainer.check_val_every_n_epoch", "1", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.logger", "false", "--monitor", "false", "--trainer.accelerator", "cpu"),
)
# last.ckpt is written after an even number of steps, so a step is repeated.
KILLED_AFTER = 7
KILL = "--trainer.callbacks+=bn_lightning.testing.tasks.interruption.KillOnce"
EXACT = ("--trainer.precision", "64-true", "--trainer.sync_batchnorm", "true")


@dataclass
class Run:
    """A run of `fit` that has ended.

    Attributes:
        folder: the folder of the run, which does not exist if the run failed early.
        done: exit code and output.
    """

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def has_failed(self) -> bool:
        return self.done.returncode != 0

    @property
    def error(self) -> str:
        """The end of what the run has printed as an error."""
        lines = self.done.stderr.strip().splitlines() or self.done.stdout.strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-8:])

    @cached_property
    def outcome(self) -> dict[str, Any]:
        return outcomes.read(self.folder)


class Runs:
    """The runs of one class of tests.

    Args:
        tests: the class.
        folder: an empty folder for the runs.
        fraction: the fraction of the first loss that one batch is trained to.
    """

    def __init__(self, tests: type[ExperimentTests], folder: Path, fraction: float) -> None:
        self.tests = tests
        self.folder = folder
        self.fraction = fraction

    @property
    def fitted(self) -> Fitted:
        """A task that was trained on one batch in this process. If it cannot be, the test fails."""
        if isinstance(self._fitted, Exception):
            what = f"Training on one batch fails: {describe(self._fitted)}"
            fail(what, "the code that raises this error.")
        return self._fitted

    @cached_property
    def _fitted(self) -> Fitted | Exception:
        try:
            return fitting.fit(self.tests, self.folder, self.fraction)
        except Exception as error:
            # The code of the user may raise anything. It is not run again for each test.
            return error

    @cached_property
    def finished(self) -> Run:
        """A run in a process of its own."""
        return self._fit("finished", *self.tests.settings, *BRIEF)

    @cached_property
    def repeated(self) -> Run:
        """A run with config.yaml of the finished run."""
        return self._fit("repeated", "--config", str(self._config))

    @cached_property
    def killed(self) -> Run:
        """A run with the same settings that was killed in its second epoch."""
        return self._fit("resumed", *self._killing)

    @cached_property
    def resumed(self) -> Run:
        """The killed run, after it was resumed."""
        return self._fit("resumed", *self._killing, "--ckpt_path", "last")

    @cached_property
    def one_process(self) -> Run:
        """A run in float64 with synchronized norms, in this process."""
        flags = (*self.tests.settings, *BRIEF, *EXACT, *self._where("one"))
        code, error = 0, ""
        try:
            run.command_line(["fit", *flags], self.tests.experiment)
        except Exception as found:
            # The code of the user may raise anything.
            code, error = 1, describe(found)
        return self._run("one", subprocess.CompletedProcess(flags, code, "", error))

    @cached_property
    def two_processes(self) -> Run:
        """The same run with two processes."""
        two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
        return self._fit("two", *self.tests.settings, *BRIEF, *EXACT, *two)

    @property
    def was_killed(self) -> bool:
        """Whether the killed run has trained until it was killed."""
        return self._marker.exists()

    @property
    def _marker(self) -> Path:
        return self.folder / "killed"

    @property
    def _config(self) -> Path:
        return self.finished.folder / "config.yaml"

    @property
    def _killing(self) -> tuple[str, ...]:
        flags = ("--config", str(self._config), "--checkpoint.every_n_train_steps", "2")
        file = ("--trainer.callbacks.file", str(self._marker))
        return (*flags, KILL, *file, "--trainer.callbacks.batches", str(KILLED_AFTER))

    def _fit(self, name: str, *flags: str) -> Run:
        # Paths in the settings are relative to the current folder.
        done = self.tests.run("fit", *flags, *self._where(name), cwd=Path.cwd())
        return self._run(name, done)

    def _where(self, name: str) -> tuple[str, ...]:
        return "--trainer.default_root_dir", str(self.folder / name), "--name", "run"

    def _run(self, name: str, done: subprocess.CompletedProcess[str]) -> Run:
        return Run(self.folder / name / "run" / "0", done)
