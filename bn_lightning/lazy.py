"""Exports of a package that are imported on first use."""

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Return what a package exports under a name, for its `__getattr__`.

    Args:
        modules: maps each exported name to its module, relative to the package.

    Raises:
        AttributeError: the package does not export the name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
