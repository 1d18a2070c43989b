"""What identifies the code of a run, and how a change of it is described."""

import sys

import pytest

from bn_lightning.studies import code
from bn_lightning.studies.code import Code
from tests.conftest import PROJECTS

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that is searched for modules, with a package `own` and a module `other_norm`."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text("")
    (tmp_path / "own/layers.py").write_text("def layer():\n    from .formulas import mean\n")
    (tmp_path / "own/formulas.py").write_text("import scipy.stats\nfrom constants import EPS\n")
    (tmp_path / "own/unused.py").write_text("")
    (tmp_path / "constants.py").write_text("EPS = 1e-5\n")
    (tmp_path / "other_norm.py").write_text("raise ZeroDivisionError\n")
    return tmp_path


SETTINGS = {"model.norm": "own.layers.layer", "data.root": "own/data", "model.lr": 0.1}


def test_source_that_an_import_path_names_is_followed_through_imports(project):
    before = code.identify(EXPERIMENT, SETTINGS)
    modules = {"own", "own.layers", "own.formulas", "constants"}
    assert before.sources.keys() == {"bn_lightning", *modules}
    assert {"torch", "lightning", "scipy"} <= before.versions.keys()
    assert code.identify(EXPERIMENT, SETTINGS).difference(before) is None
    (project / "own/unused.py").write_text("changed = True\n")
    (project / "other_norm.py").write_text("changed = True\n")
    assert code.identify(EXPERIMENT, SETTINGS).difference(before) is None
    (project / "constants.py").write_text("EPS = 1e-3\n")
    after = code.identify(EXPERIMENT, SETTINGS)
    assert after.difference(before) == "the source of constants has changed"


def test_import_paths_are_found_anywhere_in_the_settings_and_are_not_imported(project):
    callbacks = [{"class_path": "other_norm.Callback", "init_args": {"x": 1}}]
    for settings in ({"trainer": {"callbacks": callbacks}}, {"model.norm_args": {"x": "own.X"}}):
        found = code.identify(EXPERIMENT, settings).sources
        assert {"other_norm", "own"} & found.keys()
    assert "other_norm" not in sys.modules
    installed = code.identify(EXPERIMENT, {"model.network": "scipy.stats.norm"})
    assert "scipy" in installed.sources and "scipy" in installed.versions


def test_the_package_of_the_experiment_is_part_of_its_code(monkeypatch):
    monkeypatch.syspath_prepend(PROJECTS)
    found = code.identify("friedman.experiment:EXPERIMENT", {})
    assert found.sources.keys() == {"bn_lightning", "friedman"}


def test_an_experiment_without_a_package_is_followed_through_imports(project):
    (project / "single.py").write_text("import constants\n")
    found = code.identify("single:EXPERIMENT", {})
    assert found.sources.keys() == {"bn_lightning", "single", "constants"}


def test_a_difference_names_modules_and_versions():
    before = Code({"a": "1", "b": "1"}, {"torch": "2.14.1"})
    now = Code({"a": "2", "b": "1"}, {"torch": "2.15.0"})
    expected = "the source of a has changed; torch was 2.14.1 and is now 2.15.0"
    assert now.difference(before) == expected
    assert "was not recorded" in now.difference(Code())


def test_the_first_record_of_a_run_is_kept(tmp_path):
    assert code.recorded(tmp_path) == Code()
    code.record(tmp_path, Code({"a": "1"}, {"torch": "2"}))
    code.record(tmp_path, Code({"a": "2"}, {"torch": "2"}))
    assert code.recorded(tmp_path) == Code({"a": "1"}, {"torch": "2"})
    (tmp_path / code.FILE).write_text("{")
    assert code.recorded(tmp_path) == Code()
