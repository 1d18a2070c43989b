"""Lookup of classes, functions and objects by name or by import path, `package.module.Name`."""

import difflib
import importlib
import inspect
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from bn_lightning.errors import UserError

PACKAGE = Path(__file__).parent
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
Found = TypeVar("Found")


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
        module = sys.modules.get(module_name)
        near = similar(attribute, list(vars(module)))[:1] if module else []
        hint = f"Did you mean {module_name}.{near[0]}?\n" if near else ""
        raise UserError(
            f"The {kind} {name!r} cannot be imported: {error}.\n"
            f"{hint}The path refers to the object {attribute!r} in the module {module_name!r}. The "
            "module must be installed or in the current folder."
            + (f"\nKnown names: {', '.join(known)}." if known else "")
        ) from error


def find_name(name: str, kind: str, known: Mapping[str, Found]) -> Found:
    """Return an entry of `known`. Unlike in `find`, import paths are not accepted.

    Raises:
        UserError: the name is unknown.
    """
    if name not in known:
        raise UserError(f"Unknown {kind} {name!r}. Use one of {', '.join(known)}.")
    return known[name]


def describe_arguments(
    target: Callable[..., Any], given: Iterable[str], passed: Iterable[str]
) -> str:
    """Return sentences on which arguments settings may pass to a class or function.

    Args:
        given: names of the arguments in the settings. A similar name is suggested for
            each that is unknown.
        passed: names of the arguments that are always passed, and cannot be set.
    """
    parameters = [p for p in inspect.signature(target).parameters.values() if p.name not in passed]
    if not parameters:
        return "It takes no arguments."
    known = [p.name for p in parameters]
    unknown = [name for name in given if name not in known]
    near = {n: None for name in unknown for n in similar(name, known)[:1]}
    hint = f"Did you mean {' or '.join(near)}?\n" if near else ""
    described = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]
    return f"{hint}Its arguments are {', '.join(described)}."


def similar(name: str, known: Sequence[str]) -> list[str]:
    """Return up to three similar names, the most similar one first."""
    return difflib.get_close_matches(name, known, n=3)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean X?" with the most similar name, or "" if none is similar."""
    return "".join(f" Did you mean {match}?" for match in similar(name, known)[:1])


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


def users_lines(error: BaseException) -> list[str]:
    """Return the lines of the user's own code in the trace of an error, the innermost last.

    Code of this package, of installed packages and of Python is left out.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return [
        f"In {frame.filename}, line {frame.lineno}: {frame.line}"
        for frame in frames
        if not Path(frame.filename).is_relative_to(PACKAGE)
        if not frame.filename.startswith("<") and not is_installed(Path(frame.filename))
    ]


def is_installed(path: Path) -> bool:
    """Return whether a file belongs to Python or to an installed package."""
    roots = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    roots += [*site.getsitepackages(), site.getusersitepackages()]
    return any(path.is_relative_to(root) for root in roots)
