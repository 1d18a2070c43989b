"""Processes that read samples: how they end, and what their failures mean."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import Any

from bn_lightning.errors import RunFailed

# These signals ask a run to stop. A terminal or SLURM sends them to all processes, but
# only the training process can save and stop.
IGNORED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
MAX_WORKERS = 8  # by default
# A forked worker starts at once. From Python 3.14 on, the default on Linux is a fork server, with
# which each worker would import PyTorch again, in each epoch.
START_METHOD = "fork" if sys.platform == "linux" else None
SHARED_MEMORY_IS_FULL = "The shared memory of the worker processes, /dev/shm, is too small or full."
ADVICE = (
    "Use fewer workers or smaller batches. Workers pass batches through shared memory; with 0 "
    "workers, the process itself reads, and needs none. In a container: docker run --shm-size 2g"
)


class WorkerFailed(RunFailed):
    """A sample could not be read, or a worker process has ended."""


def default_workers(num_processes: int) -> int:
    """Return the number of workers for each of the training processes of this machine."""
    # This is the number of cores that this process may use.
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, num_cores // num_processes))


def init_worker(worker_id: int) -> None:
    """Let a process end only with its parent, or when the parent ends it.

    It is for `DataLoader(worker_init_fn=...)`.
    """
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # PyTorch's own check is made only between two batches.
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@contextmanager
def ending_with(batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """End the workers of a DataLoader's iterator with the block, and describe their failure.

    Raises:
        WorkerFailed: a worker has ended by itself.
    """
    workers = list(batches._workers)  # type: ignore[attr-defined]
    # Python waits for the workers when this process ends, also within the block. They end
    # earlier than their queues, which have priority 10.
    end = Finalize(None, _end, (batches, workers), exitpriority=20)
    try:
        yield batches
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        if not what.startswith("DataLoader worker") and "shared memory" not in what:
            raise
        raise WorkerFailed(f"{_cause(workers, what)}\n{ADVICE}") from error
    finally:
        end()


def _end(batches: Any, workers: list[Any]) -> None:
    batches._shutdown_workers()
    for worker in workers:
        # PyTorch and Python send SIGTERM to a worker that still reads. It is ignored.
        worker.kill()


def _cause(workers: list[Any], message: str) -> str:
    for worker in workers:
        worker.join(1)
        if worker.exitcode == -signal.SIGBUS:
            return SHARED_MEMORY_IS_FULL
        if worker.exitcode is not None and worker.exitcode < 0:
            name = signal.Signals(-worker.exitcode).name
            hint = " The system sends it if memory is exhausted." if name == "SIGKILL" else ""
            return f"A worker process that reads samples was ended by {name}.{hint}"
    return f"A worker process that reads samples has failed: {message}"
