"""The public names of the package: importable, listed, and imported on first use."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import bn_lightning


@pytest.mark.parametrize("name", bn_lightning.__all__)
def test_each_public_name_is_listed_and_importable(name):
    assert name in dir(bn_lightning)
    found = getattr(bn_lightning, name)
    assert callable(found)
    assert found.__name__ == name
    assert found.__module__.startswith("bn_lightning.")


def test_names_required_by_a_project_are_public():
    assert {"Experiment", "Task", "Step", "DataModule", "UserError"} <= set(bn_lightning.__all__)


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'bn_lightning' has no attribute 'Nothing'"):
        bn_lightning.Nothing  # noqa: B018
    assert not hasattr(bn_lightning, "lenet")


def test_imports_for_type_checkers_equal_the_table_of_modules():
    source = Path(bn_lightning.__file__).read_text()
    imported = re.findall(r"from bn_lightning\.(\S+) import \(?\s*(\w+) as (\w+)", source)
    assert all(name == alias for _, name, alias in imported)
    assert {name: module for module, name, _ in imported} == bn_lightning._MODULES


@pytest.mark.parametrize(
    "code", ["dir(bn_lightning)", "bn_lightning.__version__", "bn_lightning.UserError"]
)
def test_importing_the_package_does_not_import_torch(code):
    script = (
        f"import sys, bn_lightning; {code}\n"
        "assert not {'torch', 'lightning', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert set(bn_lightning.__all__) <= set(dir(bn_lightning))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_has_a_public_name():
    """A module `bn_lightning.batch_norm` would hide the function of that name."""
    for name in bn_lightning.__all__:
        assert find_spec(f"bn_lightning.{name}") is None
