"""Objects by name or by import path."""

import importlib
import sys

import pytest
import torch
from torch.optim import Optimizer

from bn_lightning import UserError, lookup
from bn_lightning.norms.layer import BatchNorm

KNOWN = {"custom": BatchNorm, "none": None}


def test_a_known_name_comes_first():
    assert lookup.find("custom", "norm", KNOWN) is BatchNorm
    assert lookup.find("none", "norm", KNOWN) is None
    # A module of the same name does not hide it.
    assert lookup.find("torch.nn.ReLU", "norm", {"torch.nn.ReLU": 3}) == 3


def test_an_import_path():
    assert lookup.find("torch.nn.GroupNorm", "norm", KNOWN) is torch.nn.GroupNorm
    assert lookup.find("bn_lightning.norms.layer.BatchNorm", "norm", KNOWN) is BatchNorm
    assert lookup.find("bn_lightning.BatchNorm", "norm", {}) is BatchNorm  # a lazy export


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("batch", r"There is no norm 'batch'\. There are custom, none, or an import path"),
        (".BatchNorm", r"There is no norm '\.BatchNorm'"),
        ("", "There is no norm ''"),
        ("no_such_module.Norm", "No module named 'no_such_module'"),
        ("torch.nn.NoNorm", "has no attribute 'NoNorm'"),
        ("torch.nn.", "has no attribute ''"),
        ("torch.nn.ReLU.forward", "No module named 'torch.nn.ReLU'"),
        ("not an.identifier", "No module named 'not an'"),
    ],
)
def test_what_is_not_found_is_said(name, said):
    with pytest.raises(UserError, match=said) as refused:
        lookup.find(name, "norm", KNOWN)
    message = str(refused.value)
    assert f"norm {name!r}" in message
    assert "custom, none" in message  # what there is


def test_how_a_path_is_read_is_said():
    with pytest.raises(UserError) as refused:
        lookup.find("a.b.c", "optimizer", {})
    assert "It is read as the name 'c' in the module 'a.b'" in str(refused.value)
    assert "Known without an import" not in str(refused.value)


def test_a_relative_path_is_refused():
    with pytest.raises(UserError):
        lookup.find("..layer.BatchNorm", "norm", KNOWN)


def test_a_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match="No module named 'no_such_package'") as refused:
        lookup.find("needs_more.Norm", "norm", KNOWN)
    assert isinstance(refused.value.__cause__, ModuleNotFoundError)


def test_an_object_is_no_name():
    with pytest.raises(UserError, match=r"The norm is given by its name, as text: norm='.*Batch"):
        lookup.find(BatchNorm, "norm", KNOWN)
    with pytest.raises(UserError, match="as text"):
        lookup.find(3, "norm", KNOWN)


def test_classes_of_a_module():
    found = lookup.classes_in(torch.optim, Optimizer)
    assert found["AdamW"] is torch.optim.AdamW
    assert "Optimizer" not in found  # the base itself
    assert "lr_scheduler" not in found
    assert list(found) == sorted(found)
    assert all(
        issubclass(kind, Optimizer) and not name.startswith("_") for name, kind in found.items()
    )


# What a package itself defines

PARTS = """\
import functools
from functools import partial
from pathlib import Path

from torch.optim import SGD
from torch import nn


class Own(nn.Module):
    class Inner:
        pass


def make():
    pass


def decorate(function):
    return functools.wraps(function)(lambda: None)


decorated = decorate(make)
AN_OBJECT = Own()
bound = partial(Path, "/")
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("toy_shop", "toy_shop_next_door"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("from pathlib import Path\n")
        (tmp_path / package / "parts.py").write_text(PARTS)
    (tmp_path / "toy_shop/__init__.py").write_text("from toy_shop.parts import SGD, Own\n")
    (tmp_path / "toy_shop/fails.py").write_text("import no_such_package\n")
    yield
    for name in [name for name in sys.modules if name.startswith("toy_shop")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    "name",
    [
        "toy_shop.parts.Own",
        "toy_shop.Own",  # defined in a module of the package
        "toy_shop.parts.make",
        "toy_shop.parts.decorated",
        "toy_shop.parts.AN_OBJECT",
    ],
)
def test_what_a_package_defines(shop, name):
    assert lookup.is_defined_in(name, "toy_shop")


@pytest.mark.parametrize(
    "name",
    [
        "toy_shop.parts.SGD",  # imported from elsewhere
        "toy_shop.SGD",
        "toy_shop.parts.Path",
        "toy_shop.parts.functools",
        "toy_shop.parts.bound",
        "toy_shop.parts",  # a module
        "toy_shop.parts.nothing",
        "toy_shop.nothing.Own",
        "toy_shop.fails.Own",
        "toy_shop",
        "Own",
        "",
        "..toy_shop.parts.Own",
    ],
)
def test_what_it_does_not(shop, name):
    assert not lookup.is_defined_in(name, "toy_shop")


def test_another_package_is_not_imported(shop):
    for name in ("toy_shop_next_door.parts.Own", "torch.optim.SGD", "antigravity.fly"):
        assert not lookup.is_defined_in(name, "toy_shop")
    assert "toy_shop_next_door" not in sys.modules
    assert "antigravity" not in sys.modules
    assert not lookup.is_defined_in("toy_shop.parts.Own", "toy")
