"""Static checks of a new project. test_life_cycle.py runs its tests."""

import os
import subprocess
import sys

import pytest

from bn_lightning.projects import names
from tests.conftest import REPOSITORY
from tests.support.projects import new

NAMES = ("a", "a_project_with_the_longest_name_possible"[: names.MAX_LENGTH])


def checked(folder, *command):
    """Run a tool in a folder; fail the test unless it finds nothing."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_ruff_finds_nothing_whatever_the_name(tmp_path, name):
    new(tmp_path / name)
    checked(tmp_path / name, "ruff", "check", "--no-cache", ".")
    checked(tmp_path / name, "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
    new(tmp_path / "shop")
    checked(tmp_path / "shop", "mypy")
