"""The lines that tell how far a study is."""

import io
import sys

import pytest

from bn_lightning.studies import progress
from bn_lightning.studies.progress import StudyProgress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, `clock[0]`."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_each_ended_run_with_the_time_that_is_left(clock, capsys):
    with StudyProgress(total=5, done=1) as shown:
        clock[0] = 10.0
        shown.end("a", "first")
        clock[0] = 400.0
        shown.advance("b", 0.5)
        shown.advance("b", 0.25)  # a run that was repeated: what was done is not taken back
        shown.advance("c", 0.5)
        shown.end("b", "second")
        shown.end("c", "third")
        shown.end("d", "last")
    assert capsys.readouterr().out.splitlines() == [
        "[2/5] first; about 30 s to go",
        "[3/5] second; about 4 min to go",
        "[4/5] third; about 2 min to go",
        "[5/5] last",
    ]


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with StudyProgress(total=2, done=0) as shown:
        shown.advance("a", 0.5)
        assert "0.5/2 runs" in screen.getvalue()
        shown.end("a", "first")
    assert "[1/2] first\n" in screen.getvalue() and "to go" not in screen.getvalue()
