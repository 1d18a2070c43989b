"""The wheel works without the checkout from which it was built."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Without PYTHONPATH, modules of the checkout or the user cannot be imported.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, cwd, check=True):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN, capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_trains_and_checks_a_norm(tmp_path):
    # A clone has only committed files. The checkout may contain old build folders.
    run("git", "clone", "--quiet", REPOSITORY, tmp_path / "clone", cwd=tmp_path)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path]
    run(*pip, *build, tmp_path / "clone", cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")

    names = zipfile.ZipFile(wheel).namelist()
    packages = {Path(name).parts[1] for name in names if name.startswith("bn_lightning/")}
    expected = {
        path.name for path in (REPOSITORY / "bn_lightning").glob("*/") if path.name[0] != "_"
    }
    assert expected <= packages
    assert "bn_lightning/data/sample/train-images-idx3-ubyte.gz" in names
    assert "bn_lightning/py.typed" in names
    assert not any(name.startswith("tests") for name in names)

    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    installed = run(python, "-m", "pip", "install", wheel, cwd=empty, check=False)
    if re.search("connection|Temporary failure|No matching distribution", installed.stderr):
        pytest.skip(f"no package registry is reachable: {installed.stderr.splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr

    settings = ("--data.source", "sample", "--trainer.max_epochs", 1, "--trainer.accelerator")
    done = run(python, "-m", "bn_lightning", "fit", *settings, "cpu", cwd=empty)
    assert "Ankle boot" in done.stdout and (empty / "runs/lenet/0/result.json").is_file()
    done = run(scripts / "bn_lightning", "check", "custom", "--identical", cwd=empty)
    assert "custom: " in done.stdout and "FAIL" not in done.stdout
    # Messages have the name of the console script.
    done = run(scripts / "bn_lightning", "fit", "--lr", 1, cwd=empty, check=False)
    assert done.returncode == 2 and "All settings: bn_lightning fit --help" in done.stderr
