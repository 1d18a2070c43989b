import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bn_lightning import cli, terminal
from bn_lightning.data import sources

REPOSITORY = Path(__file__).parent.parent
PROJECTS = Path(__file__).parent / "projects"

# A run of seconds on the packaged sample: 2 epochs of 22 steps.
QUICK = ("--data.source", "sample", "--trainer.max_epochs", "2")

needs_all_images = pytest.mark.skipif(
    not sources.SYSTEM.is_dir(),
    reason=f"needs all of Fashion-MNIST in {sources.SYSTEM} (package dataset-fashion-mnist)",
)


def on_cpu(arguments):
    """The arguments, with the accelerator on which runs are compared bit by bit."""
    trains = (
        arguments
        and arguments[0] in ("fit", "validate", "test", "predict")
        and "--help" not in arguments
    )
    if trains and "--trainer.accelerator" not in arguments:
        arguments = (*arguments, "--trainer.accelerator", "cpu")
    return [str(argument) for argument in arguments]


def command(*arguments, cwd, timeout=240, check=True, module="bn_lightning"):
    """Run `python -m MODULE` in a process of its own; fails the test unless it exits with 0."""
    paths = [str(PROJECTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", module, *on_cpu(arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """The command line in this process and in an empty folder: `main(*arguments)` gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(terminal, "_program", "python -m bn_lightning")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bn_lightning", *on_cpu(arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run on the sample, and what it printed. Not to be changed by a test."""
    cwd = tmp_path_factory.mktemp("trained")
    done = command("fit", *QUICK, cwd=cwd)
    return cwd / "runs" / "lenet" / "0", done.stdout


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
