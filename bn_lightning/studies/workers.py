"""Warm worker processes: each has imported everything once, and runs one `fit` after the other.

The parent says what to run and is told how far it is; what a run leaves lies in its folder.
"""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import lightning.pytorch as pl

from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import run
from bn_lightning.runs.records import Records
from bn_lightning.training.stopping import Stopped


@dataclass(frozen=True)
class Progress:
    """How far a run is: the fraction of it that is done, and the accuracy of each validation."""

    fraction: float
    val_acc: list[float]


class Interrupted(Exception):
    """A run was stopped from outside; all of it is kept, and it can go on."""


class Workers:
    """Processes for runs at once, with the cores divided among them. A context manager.

    Args:
        jobs: among how many the cores are divided.
        runs: of no more than so many there is need.

    Attributes:
        threads: as many threads of this process as there are workers, each to wait for a run.
        stopped: set when the runs are to end.
    """

    def __init__(self, jobs: int, runs: int) -> None:
        self.jobs, self.count = jobs, min(jobs, runs)
        self.threads = ThreadPoolExecutor(self.count)
        self.stopped = threading.Event()
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._all: list[_Worker] = []

    def __enter__(self) -> "Workers":
        if self.jobs > 1:  # read once, when a worker imports torch
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.jobs)))
        for _ in range(self.count):
            self._free.put(self._begin())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        """End all workers. A run that is under way finishes its step, and keeps what it has done."""
        self.stopped.set()
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.interrupt()
        self.threads.shutdown()
        for worker in self._all:
            worker.end()

    def _begin(self) -> "_Worker":
        worker = _Worker()
        self._all.append(worker)
        return worker

    def fit(self, arguments: Sequence[str], log: Path, go_on: Callable[[Progress], bool]) -> Path:
        """Run `fit` with these arguments in a free worker, and give the folder of the run. For any thread.

        Args:
            arguments: as they would be typed behind `fit`.
            log: the file to which what the run prints is added.
            go_on: called at the end of each epoch and each validation; False ends the run there, as if it were done.
                What it raises ends the process of the run.

        Raises:
            RunFailed: the run has failed, or its process has gone.
            Interrupted: the run was stopped.
        """
        worker = self._free.get()
        worker.is_busy = True  # from here on it is told to stop
        try:
            if self.stopped.is_set():
                raise Interrupted
            return worker.fit(arguments, log, go_on)
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            if self.stopped.is_set() or code == 130:  # by Ctrl-C, which goes to all processes of the terminal
                raise Interrupted from None
            died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise RunFailed(f"Its process has gone ({died}). What it has printed: {log}") from None
        finally:
            worker.is_busy = False
            if not self.stopped.is_set() and not worker.process.is_alive():
                worker = self._begin()
            self._free.put(worker)


class _Worker:
    """One process, as its parent sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have locks of threads that it has not
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,))
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None  # until it has imported all
        self.process.start()
        if is_main:
            signal.signal(signal.SIGINT, before)
        theirs.close()  # so that its end is seen here
        self.is_busy = False

    def fit(self, arguments: Sequence[str], log: Path, go_on: Callable[[Progress], bool]) -> Path:
        try:
            self._connection.send((list(arguments), log))
            while isinstance(said := self._connection.recv(), Progress):
                try:
                    self._connection.send(go_on(said))
                except Exception:
                    self.process.kill()  # it waits for an answer
                    self.process.join()
                    raise
        except OSError as error:
            raise EOFError from error
        if isinstance(said, Exception):
            raise said
        return Path(said)

    def interrupt(self) -> None:
        """Have the run that is under way stop after its step."""
        if self.is_busy and self.process.is_alive():
            os.kill(self.process.pid or 0, signal.SIGTERM)

    def end(self) -> None:
        self._connection.close()
        self.process.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _WarmCLI(run.CLI):
    """A run whose images were read once, for all runs of this process."""

    images: ClassVar[dict[Any, Any]] = {}  # by where they come from

    def before_fit(self) -> None:
        data = self.datamodule
        place = (data.source, str(data.root), tuple(data.mirrors))
        data.images = self.images.get(place)
        super().before_fit()
        self.images[place] = data.images


class _Reporter(pl.Callback):
    """Tells the parent how far the run is, and ends it if the parent wants no more of it."""

    def __init__(self, parent: "connection.Connection[Any, Any]") -> None:
        self.parent = parent

    def say(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        [kept] = [callback for callback in trainer.callbacks if isinstance(callback, Records)]  # type: ignore[attr-defined]
        total: float = trainer.max_steps
        if total < 0:
            total = (trainer.max_epochs or 1) * -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        accuracies = [figures["val_acc"] for figures in kept.validations]
        self.parent.send(Progress(min(1.0, trainer.global_step / total), accuracies))
        if not self.parent.recv():
            trainer.should_stop = True

    on_validation_end = say
    on_train_epoch_end = say


def _work(parent: "connection.Connection[Any, Any]") -> None:
    """What a worker does: run what it is told, until there is nothing more or the parent has gone."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    run.set_up()
    terminal = os.dup(1), os.dup(2)
    while True:
        try:
            arguments, log = parent.recv()
        except (EOFError, OSError):
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            os.dup2(file.fileno(), 1)  # also what does not ask Python
            os.dup2(file.fileno(), 2)
            answer = _fit(arguments, parent)
            os.dup2(terminal[0], 1)
            os.dup2(terminal[1], 2)
        parent.send(answer)


def _fit(arguments: list[str], parent: "connection.Connection[Any, Any]") -> Path | Exception:
    """The folder of the run, or why there is no result in it."""
    try:
        return run.command_line(["fit", *arguments], _WarmCLI, [_Reporter(parent)]).folder or Path()
    except Stopped:
        return Interrupted()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return RunFailed(str(error))
    except Exception as error:
        traceback.print_exc()
        return RunFailed(f"{type(error).__name__}: {error}")


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
