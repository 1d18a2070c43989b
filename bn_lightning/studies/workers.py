"""Worker processes: each imports everything once, and runs one `fit` after the other.

The parent sends the arguments of `fit` to a worker, and receives its progress. The
result of a run is in its folder.
"""

import errno
import functools
import math
import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from types import TracebackType
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

# Called with the progress of a run. False ends the run.
OnProgress = Callable[["Progress"], bool]


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


class Workers:
    """A context manager for processes that train runs in parallel.

    Args:
        reference: import path of the experiment.
        jobs: number of processes; CPU cores are divided among them.
        runs: number of runs, the maximum number of processes that are started.
        gpus: GPUs of this machine. Each process gets one of them; if there are more
            processes than GPUs, they share them.

    Attributes:
        count: number of processes.
        threads: a pool with one thread per worker. Each thread waits for a run.
        stopped: set when all runs have to stop.
    """

    def __init__(self, reference: str, jobs: int, runs: int, gpus: Sequence[str] = ()) -> None:
        self.reference, self.jobs, self.count = reference, jobs, min(jobs, runs)
        self.gpus = gpus if self.count > 1 else ()
        self.threads = ThreadPoolExecutor(self.count)
        self.stopped = threading.Event()
        self._idle: queue.Queue[_Worker] = queue.Queue()
        # Includes workers that have died.
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        if self.jobs > 1:
            # OpenMP reads this when torch is imported, in the worker or its fork
            # server.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.jobs)))
        for number in range(self.count):
            gpu = self.gpus[number % len(self.gpus)] if self.gpus else None
            self._idle.put(self._start(gpu))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        """End all workers. Each running `fit` finishes its current step and saves its work."""
        self.stopped.set()
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.interrupt()
        self.threads.shutdown()
        for worker in self._workers:
            worker.end()

    def _start(self, gpu: str | None) -> "_Worker":
        worker = _Worker(self.reference, gpu)
        self._workers.append(worker)
        return worker

    def fit(self, arguments: Sequence[str], log: Path, on_progress: OnProgress) -> Path:
        """Run `fit` in an idle worker, and return the folder of the run. Thread-safe.

        Args:
            arguments: the arguments of `fit`.
            log: the file to which the output of the run is appended.
            on_progress: called after each epoch and each validation. If it returns
                False, the run ends there with a result. If it raises an exception, the
                worker process is killed.

        Raises:
            RunFailed: the run failed.
            MachineFailure: the process of the run died, or the machine failed.
            Interrupted: the run was stopped by a signal.
        """
        worker = self._idle.get()
        # From here on, `__exit__` interrupts the worker.
        worker.is_busy = True
        try:
            if self.stopped.is_set():
                raise Interrupted
            return worker.fit(arguments, log, on_progress)
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            # A terminal sends Ctrl-C to all its processes, which exit with code 130.
            if self.stopped.is_set() or code == 130:
                raise Interrupted from None
            raise MachineFailure(
                f"The worker process {_describe_exit(code)}. Its output is in {log}."
            ) from None
        finally:
            worker.is_busy = False
            if not self.stopped.is_set() and not worker.process.is_alive():
                worker = self._start(worker.gpu)
            self._idle.put(worker)


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"died (exit code {code})"


def _cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, reference: str, gpu: str | None) -> None:
        self.gpu = gpu
        # The child inherits the ignored SIGINT: it ignores Ctrl-C until its imports are
        # done.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        context = _context()
        self._connection, child_connection = context.Pipe()
        arguments = (child_connection, reference, terminal.program(), gpu)
        self.process = context.Process(target=_work, args=arguments)
        self.process.start()
        if is_main:
            signal.signal(signal.SIGINT, before)
        # With this copy open, `recv` would not raise EOFError when the child dies.
        child_connection.close()
        self.is_busy = False

    def fit(self, arguments: Sequence[str], log: Path, on_progress: OnProgress) -> Path:
        """Run `fit`, as `Workers.fit` does.

        Raises:
            EOFError: the process died.
        """
        try:
            self._connection.send((list(arguments), log))
            while isinstance(answer := self._connection.recv(), Progress):
                try:
                    self._connection.send(on_progress(answer))
                except Exception:
                    # The process is waiting for an answer that it will not get.
                    self.process.kill()
                    self.process.join()
                    raise
        except OSError as error:
            raise EOFError from error
        if isinstance(answer, Exception):
            raise answer
        return Path(answer)

    def interrupt(self) -> None:
        """Make the current run stop after its current step."""
        if self.is_busy and self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGTERM)

    def end(self) -> None:
        """Let the process exit, and wait for it."""
        self._connection.close()
        self.process.join()


def _context() -> Any:
    """Return the multiprocessing context that starts the worker processes.

    On Linux, they are forked from a server process that imports PyTorch and Lightning
    once for all of them. This process has threads, and a fork of it could inherit a
    lock that a thread holds. The server has no threads.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # The server would search the current folder first. Like this process, it must not
    # import files that have the names of installed modules.
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in path}
    os.environ.update(path)
    forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    return context


# The functions and classes below run in the worker process.

# A process imports a module once. The first content that is read is the one that runs.
_read_once = functools.cache(Path.read_bytes)


def _work(parent: Connection, reference: str, program: str, gpu: str | None) -> None:
    """Run what the parent sends, until the parent closes the connection or dies."""
    if gpu is not None:
        # PyTorch is imported, but CUDA is initialized by the first run.
        os.environ[devices.VARIABLE] = gpu
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
