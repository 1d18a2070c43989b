"""The worker process of a study: it runs one `fit` after the other.

`workers.py` starts it. It receives the arguments of each `fit`, and sends the progress
and then the folder of the run, or the exception that the parent has to raise.
"""

import errno
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections import deque
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import lightning.pytorch as pl

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import process, run
from bn_lightning.runs.records import Records
from bn_lightning.studies import code, devices
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import Stopped
from bn_lightning.training.task import Task

Connection: TypeAlias = "connection.Connection[Any, Any]"

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of PyTorch's RuntimeErrors; only some have a class of their own.
NO_SPACE = re.compile("no space left|quota exceeded", re.IGNORECASE)
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
        fraction: fraction of the steps that are done.
        selected: the metric that the task selects by, of each validation so far.
    """

    fraction: float
    selected: list[float]


class MachineFailure(RunFailed):
    """A run failed because of the machine, not of its settings, so it can be tried again.

    Its process was killed, or memory or the disk was full.

    Attributes:
        is_disk_full: whether the disk is full, so that other runs would fail too.
    """

    def __init__(self, message: str, is_disk_full: bool = False) -> None:
        super().__init__(message, is_disk_full)
        self.is_disk_full = is_disk_full

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(Exception):
    """A run was stopped by a signal. Its work is saved, and it can be resumed."""


# A process imports a module once. The first content that is read is the one that runs.
_read_once = functools.cache(Path.read_bytes)


def work(parent: Connection, reference: str, program: str, gpu: str | None) -> None:
    """Run what the parent sends, until the parent closes the connection or dies."""
    if gpu is not None:
        # PyTorch is imported, but CUDA is initialized by the first run.
        os.environ[devices.VARIABLE] = gpu
    # Processes that a run starts, such as those of a DataLoader, start as in `fit`. By
    # default, they would be forked from a second server, which imports everything again.
    multiprocessing.set_start_method(None, force=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    terminal.set_program(program)
    process.set_up()
    outputs = os.dup(1), os.dup(2)
    while True:
        try:
            arguments, log = parent.recv()
        except (EOFError, OSError):
            return
        answer: Path | Exception | None = None
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with (
                log.open("a", encoding="utf-8") as file,
                redirect_stdout(file),
                redirect_stderr(file),
            ):
                # Redirect the file descriptors too, for output from C code.
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                answer = _fit(arguments, reference, parent)
        except OSError as error:
            # The log cannot be written.
            answer = answer or _as_failure(error, f"{log}: {error}")
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        parent.send(answer)


def _exit_with_parent() -> None:
    """Wait until the parent process ends, then exit."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _fit(arguments: list[str], reference: str, parent: Connection) -> Path | Exception:
    """Run `fit`. Return the folder of the run, or the exception for the parent to raise."""
    try:
        reporter = _Reporter(parent)
        done = run.command_line(["fit", *arguments], reference, _WarmCLI, [reporter])
        return done.folder or Path()
    except Stopped:
        return Interrupted()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _as_failure(error, str(error))
    except Exception as error:
        traceback.print_exc()
        return _as_failure(error, f"{type(error).__name__}: {error}")
    finally:
        _WarmCLI.release_trainers()


def _as_failure(error: Exception, message: str) -> RunFailed:
    """Return the exception for the parent: a MachineFailure if the machine caused the error."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    full = any(
        getattr(cause, "errno", None) in DISK_FULL or NO_SPACE.search(str(cause))
        for cause in causes
    )
    # Settings and data were validated before the study, so a file error is new.
    has_failed = any(isinstance(cause, OSError | MemoryError) for cause in causes)
    if full or has_failed or any(OUT_OF_MEMORY.search(str(cause)) for cause in causes):
        return MachineFailure(message, full)
    return RunFailed(message)


class _WarmCLI(run.CLI):
    """A run that records its code, and reuses data that its process has read earlier."""

    _earlier: ClassVar[deque[DataModule]] = deque(maxlen=4)

    def before_fit(self) -> None:
        for module in self._earlier:
            self.datamodule.reuse(module)
        super().before_fit()
        self._earlier.append(self.datamodule)
        if self.folder is not None:
            settings = self.as_plain_data(self.config.fit)
            code.record(self.folder, code.identify(self.reference, settings, _read_once))

    @classmethod
    def release_trainers(cls) -> None:
        """Drop the references from data modules to trainers, which keep the networks alive."""
        for module in cls._earlier:
            module.trainer = None


class _Reporter(pl.Callback):
    """Reports progress to the parent, and ends the run if the parent answers False."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent

    def report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Send the progress, and wait for the answer."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, Task)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        [records] = [callback for callback in callbacks if isinstance(callback, Records)]
        metric, _ = pl_module.selects
        selected = [metrics[metric] for metrics in records.validations]
        fraction = min(1.0, trainer.global_step / _planned_steps(trainer))
        self.parent.send(Progress(fraction, selected))
        if not self.parent.recv():
            trainer.should_stop = True

    on_validation_end = report
    on_train_epoch_end = report


def _planned_steps(trainer: pl.Trainer) -> float:
    """Return the total number of steps of a run, or infinity if it is unknown."""
    if trainer.max_steps >= 0:
        return trainer.max_steps
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 1
    if epochs < 0 or math.isinf(batches):
        return math.inf
    # Round up, because the last step of an epoch may accumulate fewer batches.
    return epochs * -(-batches // trainer.accumulate_grad_batches)
