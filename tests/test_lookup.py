"""Lookup of objects by name or by import path."""

import importlib
import sys

import pytest
import torch
from torch.optim import Optimizer

from bn_lightning import UserError, lookup
from bn_lightning.norms.layer import BatchNorm

KNOWN = {"custom": BatchNorm, "none": None}


def test_a_known_name_takes_precedence():
    assert lookup.find("custom", "norm", KNOWN) is BatchNorm
    assert lookup.find("none", "norm", KNOWN) is None
    # A module of that name does not take precedence.
    assert lookup.find("torch.nn.ReLU", "norm", {"torch.nn.ReLU": 3}) == 3


def test_an_import_path_is_imported():
    assert lookup.find("torch.nn.GroupNorm", "norm", KNOWN) is torch.nn.GroupNorm
    assert lookup.find("bn_lightning.norms.layer.BatchNorm", "norm", KNOWN) is BatchNorm
    assert lookup.find("bn_lightning.BatchNorm", "norm", {}) is BatchNorm  # a lazy export


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch", r"Unknown norm 'batch'\. Use one of custom, none, or an import path"),
        (".BatchNorm", r"Unknown norm '\.BatchNorm'"),
        ("", "Unknown norm ''"),
        ("no_such_module.Norm", "No module named 'no_such_module'"),
        ("torch.nn.NoNorm", "has no attribute 'NoNorm'"),
        ("torch.nn.", "has no attribute ''"),
        ("torch.nn.ReLU.forward", "No module named 'torch.nn.ReLU'"),
        ("not an.identifier", "No module named 'not an'"),
    ],
)
def test_an_unknown_name_is_reported_with_the_known_names(name, message):
    with pytest.raises(UserError, match=message) as refused:
        lookup.find(name, "norm", KNOWN)
    assert f"norm {name!r}" in str(refused.value)
    assert "custom, none" in str(refused.value)


def test_the_message_states_how_an_import_path_was_read():
    with pytest.raises(UserError) as refused:
        lookup.find("a.b.c", "optimizer", {})
    assert "The path refers to the object 'c' in the module 'a.b'" in str(refused.value)
    assert "Known names" not in str(refused.value)


def test_a_relative_path_is_refused():
    with pytest.raises(UserError):
        lookup.find("..layer.BatchNorm", "norm", KNOWN)


def test_the_cause_of_a_failed_import_is_reported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match="No module named 'no_such_package'") as refused:
        lookup.find("needs_more.Norm", "norm", KNOWN)
    assert isinstance(refused.value.__cause__, ModuleNotFoundError)


def test_an_object_instead_of_a_name_is_refused():
    with pytest.raises(
        UserError, match=r"The norm must be given as a string, not as an object. Use norm='.*Batch"
    ):
        lookup.find(BatchNorm, "norm", KNOWN)
    with pytest.raises(UserError, match="as a string"):
        lookup.find(3, "norm", KNOWN)


def test_classes_in_returns_the_public_subclasses_of_a_module():
    found = lookup.classes_in(torch.optim, Optimizer)
    assert found["AdamW"] is torch.optim.AdamW
    assert "Optimizer" not in found
    assert "lr_scheduler" not in found
    assert list(found) == sorted(found)
    assert all(
        issubclass(kind, Optimizer) and not name.startswith("_") for name, kind in found.items()
    )


# Objects that a package defines

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
def test_an_object_of_the_package_is_defined_in_it(shop, name):
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
def test_an_imported_or_unknown_object_is_not_defined_in_the_package(shop, name):
    assert not lookup.is_defined_in(name, "toy_shop")


def test_another_package_is_not_imported(shop):
    for name in ("toy_shop_next_door.parts.Own", "torch.optim.SGD", "antigravity.fly"):
        assert not lookup.is_defined_in(name, "toy_shop")
    assert "toy_shop_next_door" not in sys.modules
    assert "antigravity" not in sys.modules
    assert not lookup.is_defined_in("toy_shop.parts.Own", "toy")
