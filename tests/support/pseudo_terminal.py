"""Running a command at a pseudo-terminal."""

import multiprocessing
import os
import select

import pytest

from tests.conftest import on_cpu
from tests.support import processes


def at_a_terminal(*arguments, cwd, **environment):
    """Return the exit code of a command and its output. Skip the test without pseudo-terminals."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    controller, terminal = pty.openpty()
    # tqdm draws nothing on a terminal without a size.
    termios.tcsetwinsize(terminal, (40, 150))
    env = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "COLUMNS")}
    env |= {"TERM": "xterm-256color"} | environment
    name = os.ttyname(terminal)
    processes.preload()
    given = ("bn_lightning", on_cpu(arguments), str(cwd), env, name, name)
    context = multiprocessing.get_context(processes.START_METHOD)
    process = context.Process(target=processes.run_command, args=given)
    process.start()
    output = b""
    while True:
        # After the end of the process, the rest of its output is read.
        has_ended = not process.is_alive()
        if select.select([controller], [], [], 0 if has_ended else 0.1)[0]:
            output += os.read(controller, 65_536)
        elif has_ended:
            break
    os.close(terminal)
    os.close(controller)
    process.join()
    return process.exitcode, output.decode()
