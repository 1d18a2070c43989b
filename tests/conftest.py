"""What all tests share: how a command is run, and one finished run."""

import contextlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path

# Tests run in parallel, and OpenMP threads that wait for work would slow each other down.
# OpenMP reads this when torch is imported. Processes started by a test inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Functions below import torch and what imports it: the process that only distributes the tests
# to the others does not wait for it.
from bn_lightning import cli, terminal

REPOSITORY = Path(__file__).parent.parent
PROJECTS = Path(__file__).parent / "projects"

# A run of seconds on the packaged sample: 2 epochs of 22 steps.
QUICK = ("--data.source", "sample", "--trainer.max_epochs", "2")

# A run of half a second, for tests that need a whole run but not its length: 2 epochs of 4 small
# batches, and 2 batches in each validation and in the test.
BRIEF = (
    *(*QUICK, "--data.batch_size", "32", "--trainer.limit_train_batches", "4"),
    *("--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
)

ALL_IMAGES = Path("/usr/share/datasets/fashion-mnist")
needs_all_images = pytest.mark.skipif(
    not ALL_IMAGES.is_dir(),
    reason=f"needs all of Fashion-MNIST in {ALL_IMAGES} (package dataset-fashion-mnist)",
)


def on_cpu(arguments):
    """Return the arguments with the CPU as accelerator, on which runs are compared bit by bit."""
    trains = (
        arguments
        and arguments[0] in ("fit", "validate", "test", "predict")
        and "--help" not in arguments
    )
    if trains and "--trainer.accelerator" not in arguments:
        arguments = (*arguments, "--trainer.accelerator", "cpu")
    return [str(argument) for argument in arguments]


def run_here(*arguments, cwd, check=True, module="bn_lightning"):
    """Run `python -m MODULE` in this process; fail the test unless it exits with 0.

    A new process would spend five seconds on importing torch and Lightning. `command` starts one,
    for tests that need it: signals, a console, several ranks.
    """
    arguments = on_cpu(arguments)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "path", [str(PROJECTS), *sys.path])
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(terminal, "_program", f"python -m {module}")
        try:
            cli.main(f"{module}.experiment:EXPERIMENT")
        except SystemExit as exit:
            code = exit.code or 0
    # Another test may have a module of the same name in its own folder.
    for name, imported in list(sys.modules.items()):
        if str(getattr(imported, "__file__", None)).startswith(f"{cwd}{os.sep}"):
            del sys.modules[name]
    if check:
        assert code == 0, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(*arguments, cwd, module="bn_lightning", environment=None):
    """Start `python -m MODULE` in a new process. Return it, as `subprocess.Popen` does."""
    from tests.support import processes

    paths = [str(PROJECTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environment or {})
    return processes.start_command(module, on_cpu(arguments), cwd, environment)


def command(*arguments, cwd, timeout=240, check=True, **options):
    """Run `python -m MODULE` in a new process; fail the test unless it exits with 0.

    The options are those of `start`.
    """
    process = start(*arguments, cwd=cwd, **options)
    out, err = process.communicate(timeout=timeout)
    if check:
        assert process.returncode == 0, out + err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.fixture(autouse=True)
def seeded():
    """Seed the global generators: a test does not depend on chance or on the tests before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Change to an empty folder, and return a function that runs a command in this process.

    `main(*arguments)` returns (exit code, stdout, stderr).
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = run_here(*arguments, cwd=Path.cwd(), check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run on the sample, and its output. No test may change it."""
    cwd = tmp_path_factory.mktemp("trained")
    done = run_here("fit", *QUICK, cwd=cwd)
    return cwd / "runs" / "lenet" / "0", done.stdout


def weights(checkpoint):
    import torch

    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    import torch

    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
