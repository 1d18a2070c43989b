"""Overall progress of a study."""

import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class StudyProgress:
    """Shows progress over all runs: a bar on a terminal, otherwise one line per completed run.

    Args:
        total: number of runs in the study.
        done: number of runs that were done before this command started.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done_before = total, done
        self._fractions: dict[Any, float] = {}
        self._ended: set[Any] = set()
        # Several threads report runs.
        self._lock = threading.RLock()
        self._start = time.monotonic()
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
        """Set the completed fraction of the run `key`. The fraction never decreases."""
        with self._lock:
            self._fractions[key] = max(fraction, self._fractions.get(key, 0.0))
            self._bar.n = self._done_before + sum(self._fractions.values())
            self._bar.refresh()

    def end(self, key: Any, line: str) -> None:
        """Mark the run `key` as done, and print the line."""
        with self._lock:
            self.advance(key, 1.0)
            self._ended.add(key)
            done = self._done_before + len(self._ended)
            line = f"[{done}/{self._total}] {line}{self._time_left()}"
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _time_left(self) -> str:
        """Return the estimated remaining time, or "" if the bar shows it."""
        done = sum(self._fractions.values())
        remaining = self._total - self._done_before - done
        if not self._bar.disable or remaining <= 0:
            return ""
        seconds = (time.monotonic() - self._start) / done * remaining
        text = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
        return f" (about {text} left)"
