"""Runs a command at a pseudo-terminal, where the system has one."""

import os
import subprocess
import sys

import pytest

from tests.conftest import on_cpu


def at_a_terminal(*arguments, cwd, **environment):
    """Return the exit code of a command, and all that it writes to its terminal."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    ours, its = pty.openpty()
    # tqdm draws nothing on a terminal without a size.
    termios.tcsetwinsize(its, (40, 150))
    env = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "bn_lightning", *on_cpu(arguments)],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=cwd,
        env=env | {"TERM": "xterm-256color"} | environment,
    )
    os.close(its)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # this is how Linux reports the end
            break
        if not part:
            break
        seen += part
    os.close(ours)
    return process.wait(), seen.decode()
