"""`TaskTests` for the tasks of this repository. tests/testing/test_task_mutants.py breaks tasks."""

import pytest

from bn_lightning.testing import TaskTests
from tests.conftest import PROJECTS


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let this process and its children import the projects."""
    monkeypatch.syspath_prepend(PROJECTS)
    monkeypatch.setenv("PYTHONPATH", str(PROJECTS), prepend=":")


class TestLeNet(TaskTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = ("--data.source", "sample", "--data.batch_size", "32")


class TestFriedman(TaskTests):
    experiment = "friedman.experiment:EXPERIMENT"
