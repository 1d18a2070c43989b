"""Overall progress of a study."""

import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class StudyProgress:
    """Shows the progress of all runs: a bar at a terminal, otherwise a line for each ended run.

    Args:
        total: number of runs of the study.
        done: how many of them had ended before.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before = total, done
        self._fractions: dict[Any, float] = {}
        self._lock = threading.RLock()  # runs are reported by several threads
        self._began = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            bar_format="{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> "StudyProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, key: Any, fraction: float) -> None:
        """Note which fraction of the run `key` is done."""
        with self._lock:
            self._fractions[key] = max(fraction, self._fractions.get(key, 0.0))
            self._bar.n = self._before + sum(self._fractions.values())
            self._bar.refresh()

    def end(self, key: Any, line: str) -> None:
        """Note that the run `key` has ended, and print the line."""
        with self._lock:
            self.advance(key, 1.0)
            ended = self._before + sum(fraction == 1 for fraction in self._fractions.values())
            line = f"[{ended}/{self._total}] {line}{self._remaining()}"
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _remaining(self) -> str:
        """Return the estimated time that is left, where no bar shows it."""
        done = sum(self._fractions.values())
        left = self._total - self._before - done
        if not self._bar.disable or left <= 0:
            return ""
        seconds = (time.monotonic() - self._began) / done * left
        text = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f"; about {text} to go"
