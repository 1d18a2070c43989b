"""Progress of a study, as a bar or as lines."""

import io
import sys

import pytest

from bn_lightning.studies import progress
from bn_lightning.studies.progress import StudyProgress


@pytest.fixture
def clock(monkeypatch):
    """A list whose only element is the current time in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_each_completed_run_has_a_line_with_the_remaining_time(clock, capsys):
    with StudyProgress(total=5, done=1) as shown:
        clock[0] = 10.0
        shown.end("a", "first")
        clock[0] = 400.0
        shown.advance("b", 0.5)
        # A repeated run starts again, but its progress does not decrease.
        shown.advance("b", 0.25)
        shown.advance("c", 0.5)
        shown.end("b", "second")
        shown.end("c", "third")
        shown.end("d", "last")
    assert capsys.readouterr().out.splitlines() == [
        "[2/5] first (about 30 s left)",
        "[3/5] second (about 4 min left)",
        "[4/5] third (about 2 min left)",
        "[5/5] last",
    ]


def test_a_terminal_shows_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with StudyProgress(total=2, done=0) as shown:
        shown.advance("a", 0.5)
        assert "0.5/2 runs" in screen.getvalue()
        shown.end("a", "first")
    assert "[1/2] first\n" in screen.getvalue() and "left" not in screen.getvalue()
