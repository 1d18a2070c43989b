"""A callback that kills the process of a run, as a power failure would."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class KillOnce(pl.Callback):
    """Kill the process after a training batch, unless a file exists, which is created before.

    Args:
        file: the file. A resumed run has the same settings, and is not killed again.
        batches: number of training batches after which the process is killed.
    """

    def __init__(self, file: str, batches: int) -> None:
        self.file = file
        self.batches = batches
        self._done = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._done += 1
        path = Path(self.file)
        if self._done == self.batches and not path.exists():
            path.touch()
            # Windows has no SIGKILL, but ends a process immediately at SIGTERM.
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
