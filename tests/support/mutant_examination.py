"""Run `check` on mutants, each in a forked process with a time limit.

A mutant is caught if a property fails, if it differs from PyTorch's layer (the two batch norms
only), if it cannot be examined, or if the check does not end in time.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from bn_lightning.errors import UserError, describe_error

IDENTICAL = ("batch_norm", "manual_batch_norm")
# All bases accept these numbers of dimensions.
ALL = {"num_dims": (2, 3, 4, 5)}
# Arguments of `examine`, one check each. The warmup of batch renormalization is off by default.
CHECKS: dict[str, list[dict[str, Any]]] = {
    "batch_renorm": [ALL, {"norm_args": {"warmup": 4}}],
    "instance_norm": [{"num_dims": (3, 4)}],
}


@dataclass(frozen=True)
class Outcome:
    """Whether the check of a layer caught it, and the reason or error, which may be empty."""

    caught: bool
    note: str


def first_failure(norm: type, base: str) -> Outcome:
    """Check a layer until the first failure."""
    from bn_lightning.norms.check.examination import examine

    for arguments in CHECKS.get(base, [ALL]):
        try:
            for finding in examine(norm, identical=base in IDENTICAL, **arguments):
                if finding.verdict in ("FAIL", "DIFFERS"):
                    return Outcome(True, f"{finding.verdict}: {finding.name}")
        except UserError as error:
            return Outcome(True, f"cannot be examined: {describe_error(error)}")
        # A failure of the check itself catches nothing.
        except Exception as error:
            return Outcome(False, f"The check raised {describe_error(error)}")
    return Outcome(False, "")


def examine_all(
    layers: Iterable[tuple[str, str, type]],
    processes: int = 2,
    timeout: float = 120,
    check: Callable[[type, str], Outcome] = first_failure,
) -> Iterator[tuple[str, Outcome]]:
    """Check layers, each given by a name, its base and its class.

    Yield names and outcomes in the order in which the checks end. The timeout is in seconds.
    This process starts no threads, so that it can be forked safely.
    """
    waiting = iter(layers)
    running: dict[Connection, Child] = {}
    while True:
        while len(running) < processes and (layer := next(waiting, None)):
            child = Child(*layer, check, deadline=time.monotonic() + timeout)
            running[child.results] = child
        if not running:
            return
        first_deadline = min(child.deadline for child in running.values())
        ended = wait(list(running), max(0, first_deadline - time.monotonic()))
        ended += [c.results for c in running.values() if c.deadline < time.monotonic()]
        for results in dict.fromkeys(ended):
            child = running.pop(results)
            yield child.name, child.end()


class Child:
    """A process that checks one layer."""

    def __init__(
        self,
        name: str,
        base: str,
        norm: type,
        check: Callable[[type, str], Outcome],
        deadline: float,
    ):
        self.name = name
        self.deadline = deadline
        context = get_context("fork")
        self.results, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=run_child, args=(norm, base, check, sender))
        self.process.start()
        sender.close()

    def end(self) -> Outcome:
        """Return the outcome, and kill the process with all processes that it started."""
        try:
            outcome = self.results.recv() if self.results.poll() else Outcome(True, "hangs")
        except EOFError:
            outcome = Outcome(False, "The process of the check died")
        # The process is the leader of its group.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()
        self.process.join()
        self.results.close()
        return outcome


def run_child(
    norm: type, base: str, check: Callable[[type, str], Outcome], sender: Connection
) -> None:
    os.setsid()
    torch.set_num_threads(1)
    # Warnings of a mutant would interrupt the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sender.send(check(norm, base))
