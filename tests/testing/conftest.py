"""The projects in tests/projects can be imported, here and in processes of their own."""

import os

import pytest

from tests.conftest import PROJECTS


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    monkeypatch.setenv("PYTHONPATH", str(PROJECTS), prepend=os.pathsep)
