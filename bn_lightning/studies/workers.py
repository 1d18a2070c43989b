"""Warm worker processes: each has imported everything once, and runs one `fit` after the other.

The parent tells a worker what to run, and is told its progress. A run's result is in its folder.
"""

import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeAlias

import lightning.pytorch as pl

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import process, run
from bn_lightning.runs.records import Records
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import Stopped
from bn_lightning.training.task import Task

Connection: TypeAlias = "connection.Connection[Any, Any]"

# Returns whether the run is to continue.
OnProgress = Callable[["Progress"], bool]


@dataclass(frozen=True)
class Progress:
    """The fraction of a run that is done, and the selected metric of each validation."""

    fraction: float
    selected: list[float]


class Interrupted(Exception):
    """A run was stopped from outside. Its work is saved, and it can be resumed."""


class Workers:
    """Processes that train runs in parallel, with the cores divided among them.

    A context manager.

    Args:
        reference: of the experiment.
        jobs: number of processes among which the cores are divided.
        runs: number of runs; no more processes than that are started.

    Attributes:
        threads: as many threads of this process as there are workers, each to wait for a run.
        stopped: set when the runs are to end.
    """

    def __init__(self, reference: str, jobs: int, runs: int) -> None:
        self.reference, self.jobs, self.count = reference, jobs, min(jobs, runs)
        self.threads = ThreadPoolExecutor(self.count)
        self.stopped = threading.Event()
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._all: list[_Worker] = []

    def __enter__(self) -> "Workers":
        if self.jobs > 1:  # read once, when a worker imports torch
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.jobs)))
        for _ in range(self.count):
            self._free.put(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        """End all workers. A run that is under way finishes its step, and saves its work."""
        self.stopped.set()
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.interrupt()
        self.threads.shutdown()
        for worker in self._all:
            worker.end()

    def _start(self) -> "_Worker":
        worker = _Worker(self.reference)
        self._all.append(worker)
        return worker

    def fit(self, arguments: Sequence[str], log: Path, on_progress: OnProgress) -> Path:
        """Run `fit` in a free worker, and return the folder of the run. For any thread.

        Args:
            arguments: of `fit`.
            log: the file to which the output of the run is appended.
            on_progress: called at the end of each epoch and of each validation; False ends the run
                there, as if it were done. An exception in it ends the process of the run.

        Raises:
            RunFailed: the run has failed, or its process has died.
            Interrupted: the run was stopped.
        """
        worker = self._free.get()
        worker.is_busy = True  # from here on it is told to stop
        try:
            if self.stopped.is_set():
                raise Interrupted
            return worker.fit(arguments, log, on_progress)
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            if self.stopped.is_set() or code == 130:  # Ctrl-C goes to all processes of a terminal
                raise Interrupted from None
            died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise RunFailed(f"Its process has died ({died}). Its output: {log}") from None
        finally:
            worker.is_busy = False
            if not self.stopped.is_set() and not worker.process.is_alive():
                worker = self._start()
            self._free.put(worker)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self, reference: str) -> None:
        context = _context()
        self._connection, theirs = context.Pipe()
        told = (theirs, reference, terminal.program())
        self.process = context.Process(target=_work, args=told)
        # The process ignores Ctrl-C until it has imported everything.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        self.process.start()
        if is_main:
            signal.signal(signal.SIGINT, before)
        theirs.close()  # so that its end is seen here
        self.is_busy = False

    def fit(self, arguments: Sequence[str], log: Path, on_progress: OnProgress) -> Path:
        try:
            self._connection.send((list(arguments), log))
            while isinstance(answer := self._connection.recv(), Progress):
                try:
                    self._connection.send(on_progress(answer))
                except Exception:
                    self.process.kill()  # it waits for an answer
                    self.process.join()
                    raise
        except OSError as error:
            raise EOFError from error
        if isinstance(answer, Exception):
            raise answer
        return Path(answer)

    def interrupt(self) -> None:
        """Make the run that is under way stop after its step."""
        if self.is_busy and self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGTERM)

    def end(self) -> None:
        self._connection.close()
        self.process.join()


def _context() -> Any:
    """Return how worker processes are started.

    On Linux they are forked from a server, which imports PyTorch and Lightning once for all of
    them. The server has no threads, unlike this process, so a fork of it inherits no locked locks.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


# In the worker's process


def _work(parent: Connection, reference: str, program: str) -> None:
    """Run what the parent sends, until the parent closes the connection or dies."""
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
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            log.open("a", encoding="utf-8") as file,
            redirect_stdout(file),
            redirect_stderr(file),
        ):
            # Also for output that does not go through Python.
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            answer = _fit(arguments, reference, parent)
            os.dup2(outputs[0], 1)
            os.dup2(outputs[1], 2)
        parent.send(answer)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _fit(arguments: list[str], reference: str, parent: Connection) -> Path | Exception:
    """Return the folder of the run, or why it has no result."""
    try:
        reporter = _Reporter(parent)
        done = run.command_line(["fit", *arguments], reference, _WarmCLI, [reporter])
        return done.folder or Path()
    except Stopped:
        return Interrupted()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return RunFailed(str(error))
    except Exception as error:
        traceback.print_exc()
        return RunFailed(f"{type(error).__name__}: {error}")
    finally:
        _WarmCLI.forget_trainers()


class _WarmCLI(run.CLI):
    """A run that takes over what earlier runs of this process have read."""

    _earlier: ClassVar[deque[DataModule]] = deque(maxlen=4)

    def before_fit(self) -> None:
        for module in self._earlier:
            self.datamodule.reuse(module)
        super().before_fit()
        self._earlier.append(self.datamodule)

    @classmethod
    def forget_trainers(cls) -> None:
        """Release the networks of earlier runs, which their data modules refer to."""
        for module in cls._earlier:
            module.trainer = None


class _Reporter(pl.Callback):
    """Reports progress to the parent, and ends the run if the parent says so."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent

    def report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
    """Return the number of steps of the whole run; infinite if it is unknown."""
    if trainer.max_steps >= 0:
        return trainer.max_steps
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 1
    if epochs < 0 or math.isinf(batches):
        return math.inf
    # Rounded up: the last step of an epoch may accumulate fewer batches.
    return epochs * -(-batches // trainer.accumulate_grad_batches)
