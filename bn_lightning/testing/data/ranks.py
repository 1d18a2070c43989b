"""The same passes in several processes, each of them a rank with gloo."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bn_lightning.testing.data import passes
from bn_lightning.testing.data.reading import Plan, Reading
from bn_lightning.testing.failures import describe

# How long the processes of a plan may take.
SECONDS = 240


class RankFailed(Exception):
    """A process ended with an error, or took too long."""


@cache
def read(plans: tuple[Plan, ...]) -> list[list[Reading]]:
    """Make the passes of plans in the same processes. Return what each rank has read.

    Args:
        plans: plans of the same experiment with the same number of processes.

    Raises:
        RankFailed: a process ended with an error. The message is that of the error.
    """
    # A server forks processes that have imported this module already, and no data.
    known = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if "forkserver" in known:
        package = plans[0].source.experiment.partition(":")[0]
        context.set_forkserver_preload([__name__, package])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_run, args=(plans, rank, port, folder))
            for rank in range(plans[0].processes)
        ]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, folder)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [
            pickle.loads((folder / f"{rank}.pickle").read_bytes())
            for rank in range(plans[0].processes)
        ]


def _wait(ranks: list[multiprocessing.Process], folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while any(rank.is_alive() for rank in ranks):
        # The others would wait for a process that has ended.
        if any(rank.exitcode for rank in ranks):
            break
        if time.monotonic() > end:
            raise RankFailed(f"not all samples were read in {SECONDS} seconds")
        time.sleep(0.02)
    for number, rank in enumerate(ranks):
        if rank.exitcode:
            error = folder / f"{number}.txt"
            is_known = error.exists()
            cause = error.read_text(encoding="utf-8") if is_known else f"exit code {rank.exitcode}"
            raise RankFailed(f"process {number}: {cause}")


def _run(plans: tuple[Plan, ...], rank: int, port: int, folder: Path) -> None:
    os.chdir(plans[0].source.cwd)
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        found = [passes.read(plan) for plan in plans]
    except Exception as error:
        (folder / f"{rank}.txt").write_text(describe(error), encoding="utf-8")
        raise
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
