"""Start processes quickly: they are forked from a server that has imported the modules.

A new interpreter needs 5 to 8 seconds to import PyTorch and Lightning. The server imports them once
for all tests of a session. It runs nothing else, so a fork of it has no threads or locks in use.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing

# Windows has no fork server.
HAS_FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
START_METHOD = "forkserver" if HAS_FORK_SERVER else "spawn"


def preload():
    """Choose what the server imports before the first process is forked."""
    if HAS_FORK_SERVER:
        # This has no effect if the server is running already.
        multiprocessing.set_forkserver_preload(["bn_lightning.studies.workers", "tests.conftest"])


def start(function, arguments, nprocs, join=True):
    """Call function(rank, *arguments) in several processes, as `torch.multiprocessing.spawn`."""
    preload()
    return torch.multiprocessing.start_processes(
        function, arguments, nprocs, join, start_method=START_METHOD
    )


def result_of_ranks(function, world_size):
    """Call function(rank, world_size, port, queue) in several processes.

    Return what it puts into the queue.
    """
    queue = torch.multiprocessing.get_context(START_METHOD).SimpleQueue()
    ranks = start(function, (world_size, free_port(), queue), world_size, join=False)
    while queue.empty():
        # This raises if a rank has failed.
        ranks.join(timeout=0.1)
    result = queue.get()
    ranks.join()
    return result


def start_command(module, arguments, cwd, environment, log=None):
    """Start `python -m MODULE ARGUMENTS` in a session of its own.

    Return a `subprocess.Popen`, or a `ForkedCommand`, which has the same methods. If a `log` is
    given, the output is appended to that file.
    """
    if HAS_FORK_SERVER:
        preload()
        return ForkedCommand(module, arguments, cwd, environment, log)
    output = subprocess.PIPE if log is None else log.open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


class ForkedCommand:
    """A command in a process forked from the server. It writes to files, not to pipes."""

    def __init__(self, module, arguments, cwd, environment, log=None):
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (log or Path(self._folder.name, name) for name in ("out", "err"))
        given = (module, list(arguments), str(cwd), dict(environment), self._out, self._err)
        context = multiprocessing.get_context(START_METHOD)
        self._process = context.Process(target=run_command, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked command", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


def run_command(module, arguments, cwd, environment, out, err):
    """Become `python -m MODULE ARGUMENTS`."""
    os.setsid()
    # Processes that the command starts do not come from a server, as those of a new interpreter.
    multiprocessing.set_start_method(None, force=True)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
