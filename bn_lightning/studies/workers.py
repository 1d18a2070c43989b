"""Worker processes: each imports everything once, and runs one `fit` after the other.

The parent sends the arguments of `fit` to a worker, and receives its progress. The
result of a run is in its folder.
"""

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from types import TracebackType
from typing import Any

from bn_lightning import terminal
from bn_lightning.runs.threads import own_cores
from bn_lightning.studies import worker_process
from bn_lightning.studies.worker_process import Interrupted as Interrupted
from bn_lightning.studies.worker_process import MachineFailure as MachineFailure
from bn_lightning.studies.worker_process import Progress as Progress

# Called with the progress of a run. False ends the run.
OnProgress = Callable[[Progress], bool]


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
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(own_cores()) // self.jobs)))
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
        self.process = context.Process(target=worker_process.work, args=arguments)
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
    context.set_forkserver_preload([worker_process.__name__])
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
