"""Lookup of classes, functions and objects by name or by import path, `package.module.Name`."""

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from bn_lightning.errors import UserError


def find(name: str, kind: str, known: Mapping[str, Any]) -> Any:
    """Return an entry of `known` by its name, or an object by its import path.

    Args:
        name: a key of `known`, or `package.module.Name`; the module may be in the
            current folder.
        kind: the kind of object for error messages, such as `norm` or `optimizer`.

    Raises:
        UserError: the name is unknown, or cannot be imported.
    """
    # Settings must be plain data, because checkpoints contain them.
    if not isinstance(name, str):
        given = f"{getattr(name, '__module__', '?')}.{getattr(name, '__qualname__', '?')}"
        raise UserError(
            f"The {kind} must be given as a string, not as an object. Use {kind}={given!r}."
        )
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name or name.startswith("."):
        names = f"one of {', '.join(known)}, or " if known else ""
        raise UserError(
            f"Unknown {kind} {name!r}. Use {names}an import path such as my_module.Name."
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The {kind} {name!r} cannot be imported: {error}.\n"
            f"The path refers to the object {attribute!r} in the module {module_name!r}. The "
            "module must be installed or in the current folder."
            + (f"\nKnown names: {', '.join(known)}." if known else "")
        ) from error


def classes_in(module: ModuleType, base: type) -> dict[str, type]:
    """Return the public subclasses of `base` in a module such as `torch.optim`, by name."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and issubclass(value, base) and value is not base
        if not name.startswith("_")
    }


def is_defined_in(name: str, package: str) -> bool:
    """Return whether an import path refers to an object that is defined in the given package.

    Objects that the package imports from elsewhere do not count. No module outside the
    package is imported.
    """
    module_name, _, attribute = name.rpartition(".")
    if f"{module_name}.".partition(".")[0] != package:
        return False
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        return False
    return f"{getattr(found, '__module__', '')}.".startswith(f"{package}.")
