"""The code of a run: hashes of the source that it executes, and versions of libraries.

A study compares the code of each run with the current code. A run of other code is stale.
"""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bn_lightning import lookup
from bn_lightning.runs import experiment, folder, result, trust

# In the folder of a run.
FILE = "code.json"
PACKAGE = __name__.partition(".")[0]
LIBRARIES = ("torch", "lightning", "torchmetrics")
NOT_RECORDED = f"its code was not recorded, because an earlier version of {PACKAGE} has trained it"

Read = Callable[[Path], bytes]


@dataclass(frozen=True)
class Code:
    """What identifies the code of a run.

    Attributes:
        sources: a hash for each module, and one for each package as a whole.
        versions: versions of libraries, without the build (`+cpu`).
    """

    sources: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def difference(self, before: "Code") -> str | None:
        """Return how this code differs from an earlier one, or None if it does not."""
        if not before.versions:
            return NOT_RECORDED
        names = sorted(self.sources.keys() | before.sources.keys())
        changed = [name for name in names if self.sources.get(name) != before.sources.get(name)]
        found = [f"the source of {', '.join(changed)} has changed"] if changed else []
        found += [
            f"{name} was {before.versions.get(name)} and is now {now}"
            for name, now in self.versions.items()
            if before.versions.get(name, now) != now
        ]
        return "; ".join(found) or None


def identify(reference: str, settings: Mapping[str, Any], read: Read = Path.read_bytes) -> Code:
    """Return the current code of a run.

    It consists of this package, the package of the experiment, and each module that an
    import path in the settings names, with the modules that this module imports. Of
    installed packages that are only imported, it has the versions.

    Args:
        reference: import path of the experiment.
        settings: settings of `fit`.
        read: reads a file.
    """
    own = reference.partition(":")[0]
    # An experiment may also be a single module, which is followed like a named one.
    whole = {PACKAGE, *([experiment.package_of(reference)] if "." in own else [])}
    sources = {name: _hash_of_package(name, read) for name in whole}
    libraries = set(LIBRARIES)
    named = {
        name.rpartition(".")[0]
        for key, value in folder.flat(dict(settings)).items()
        if key not in folder.NOT_RECORDED
        for name in trust.strings(value)
        if lookup.IMPORT_PATH.fullmatch(name)
    }
    waiting = [own, *sorted(named)]
    while waiting:
        name = waiting.pop()
        for module, path in _files(name):
            top = module.partition(".")[0]
            if module in sources or top in {*whole, *LIBRARIES, *sys.stdlib_module_names}:
                continue
            if lookup.is_installed(path):
                libraries.add(top)
                if name in named and top not in sources:
                    sources[top] = _hash_of_package(top, read)
                continue
            content = read(path)
            sources[module] = _hash(content)
            if path.suffix == ".py":
                waiting += _imports(content, module, path.stem == "__init__")
    versions = {name: _version(name) for name in sorted(libraries)}
    return Code(sources, {name: found for name, found in versions.items() if found})


def record(run: Path, code: Code) -> None:
    """Write the code of a run to its folder. A run that is resumed keeps the first record."""
    if not (run / FILE).exists():
        result.write_json(run / FILE, asdict(code))


def recorded(run: Path) -> Code:
    """Return the code that is recorded in the folder of a run; empty if there is none."""
    try:
        return Code(**json.loads((run / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Code()


def _files(name: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a module and of its parent packages, without importing them."""
    locations: Any = None
    module = ""
    for part in name.split("."):
        module = f"{module}.{part}".lstrip(".")
        try:
            # For a top-level module, no parent has to be imported.
            spec = (
                PathFinder.find_spec(module, locations)
                if locations is not None
                else importlib.util.find_spec(module)
            )
        except (ImportError, ValueError):
            return
        if spec is None:
            return
        if spec.has_location and spec.origin and Path(spec.origin).is_file():
            yield module, Path(spec.origin)
        locations = spec.submodule_search_locations
        if locations is None:
            return


def _imports(source: bytes, module: str, is_package: bool) -> Iterator[str]:
    """Yield the names that a module imports, also those that are attributes of a module."""
    package = module if is_package else module.rpartition(".")[0]
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(start if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names if base)


def _hash_of_package(name: str, read: Read) -> str:
    """Return a hash of all source files of a package, or of a module without a package."""
    spec = importlib.util.find_spec(name)
    locations = (spec.submodule_search_locations if spec else None) or []
    files = sorted(file for location in locations for file in Path(location).rglob("*.py"))
    if not files and spec is not None and spec.origin:
        files = [Path(spec.origin)]
    return _hash(*map(read, files))


def _hash(*contents: bytes) -> str:
    found = hashlib.sha256()
    for content in contents:
        # Git may check out the same file with other line ends.
        found.update(hashlib.sha256(content.replace(b"\r\n", b"\n")).digest())
    return found.hexdigest()


def _version(name: str) -> str:
    """Return the version of a library. Machines of one study may have different builds of it."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""
