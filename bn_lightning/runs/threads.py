"""CPU threads of a run, and the CPU cores that other processes use."""

import os
import sys
import time
from pathlib import Path

import torch


def set_threads(count: int | None) -> None:
    """Set the number of CPU threads of PyTorch in this process. None keeps it."""
    if count is not None:
        torch.set_num_threads(count)
        # Otherwise Lightning divides the cores among the processes of a run.
        os.environ["OMP_NUM_THREADS"] = str(count)


class OtherProcesses:
    """Measures the number of CPU cores that other processes use, from its creation on."""

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def cores(self) -> float:
        """Return the mean number of cores since the creation, 0 if the system is not Linux."""
        wall, all_processes, this_process = (
            now - before for now, before in zip(_cpu_seconds(), self._before, strict=True)
        )
        return max(0.0, all_processes - this_process) / wall if wall else 0.0

    def notes(self) -> list[str]:
        """Return what --threads 1 would do, if the threads of this run have to share cores."""
        used, available = self.cores(), len(own_cores())
        threads = torch.get_num_threads()
        # Half a core is what the system uses at times.
        if threads == 1 or used + threads < available + 0.5:
            return []
        return [
            f"other processes use {used:.1f} of {available} CPU cores. The {threads} threads of "
            "this run wait for each other in each operation. With --threads 1 it would be faster; "
            "the results would differ by rounding only"
        ]


def own_cores() -> set[int]:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_seconds() -> tuple[float, float, float]:
    """Return wall time, and the CPU time of all processes and of this one, on its cores."""
    used = 0.0
    if sys.platform == "linux":
        names = {f"cpu{core}" for core in own_cores()}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name in names:
                user, nice, system = map(int, ticks[:3])
                used += (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), used, time.process_time()
