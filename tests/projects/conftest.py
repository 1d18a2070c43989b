"""A template that a test may change."""

import shutil

import pytest

from bn_lightning.projects import rendering


@pytest.fixture
def template(tmp_path_factory, monkeypatch):
    """A copy of the template, from which `new` writes projects in this test."""
    folder = tmp_path_factory.mktemp("template") / "template"
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    shutil.copytree(rendering.TEMPLATE, folder, ignore=ignored)
    monkeypatch.setattr(rendering, "TEMPLATE", folder)
    return folder
