"""Classes, functions and objects by name or by import path, `package.module.Name`."""

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from bn_lightning.errors import UserError


def find(name: str, kind: str, known: Mapping[str, Any]) -> Any:
    """Return what a name stands for: an entry of `known`, or an object by its import path.

    Args:
        name: a key of `known`, or `package.module.Name`; modules of the current folder count.
        kind: what is looked for, for error messages: `norm`, `optimizer`.

    Raises:
        UserError: no such name, or something that cannot be imported.
    """
    if not isinstance(name, str):  # a checkpoint keeps names, and no code
        given = f"{getattr(name, '__module__', '?')}.{getattr(name, '__qualname__', '?')}"
        raise UserError(f"The {kind} is given by its name, as text: {kind}={given!r}")
    if name in known:
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name or name.startswith("."):  # a relative path has no package here
        raise UserError(
            f"There is no {kind} {name!r}. There are {', '.join(known)}, or an import path: "
            "my_module.Name"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The {kind} {name!r} cannot be imported: {error}.\n"
            f"It is read as the name {attribute!r} in the module {module_name!r}, which is looked "
            "for in the current folder and among the installed packages."
            + (f"\nKnown without an import: {', '.join(known)}." if known else "")
        ) from error


def classes_in(module: ModuleType, base: type) -> dict[str, type]:
    """Return the public subclasses of `base` that a module such as `torch.optim` offers, by name."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and issubclass(value, base) and value is not base
        if not name.startswith("_")
    }


def is_defined_in(name: str, package: str) -> bool:
    """Return whether an import path leads to an object that this package itself defines.

    Only modules of the package are imported. A name that the package has imported from elsewhere
    does not count.
    """
    module_name, _, attribute = name.rpartition(".")
    if f"{module_name}.".partition(".")[0] != package:
        return False
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        return False
    return f"{getattr(found, '__module__', '')}.".startswith(f"{package}.")
