"""Mutants of plain normalization layers: copies with one small change, most of them incorrect.

They show which mistakes `bn_lightning check` finds. The changes are made by the operators in
`mutation_operators.py` and `layer_operators.py`, at each place in the source of each base.
"""

import ast
import atexit
import difflib
import functools
import hashlib
import importlib
import inspect
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support import layer_operators, mutation_operators
from tests.support.plain_norms import BASES

OPERATORS = {
    operator.__name__: operator
    for operator in (*mutation_operators.OPERATORS, *layer_operators.OPERATORS)
}
# Parameters and buffers, which only some of the bases have.
STATE = re.compile(r"self\.(running_\w+|bias)\b")


@dataclass(frozen=True)
class Mutant:
    """A changed copy of a base.

    Attributes:
        name: base.operator.line:change, where the line is that of the base's file.
        source: the source of a module with the class, without comments.
        original: the source of the base in the same form.
    """

    name: str
    source: str
    original: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def operator(self) -> str:
        return self.name.split(".")[1]

    @property
    def diff(self) -> str:
        """The lines that differ from the base, and one line before and after them."""
        both = self.original.splitlines(), self.source.splitlines()
        _, _, *lines = difflib.unified_diff(*both, n=1, lineterm="")
        return "\n".join(line for line in lines if line.strip() and line[0] != "@")

    def norm(self) -> type:
        """Import the mutant from a temporary folder on sys.path, and return its class.

        Processes that inherit sys.path can import it too, for example to unpickle a layer.
        """
        module = f"mutant_{self.base}_{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"
        path = Path(folder(), f"{module}.py")
        if not path.exists():
            path.write_text(self.source)
            importlib.invalidate_caches()
        return getattr(importlib.import_module(module), BASES[self.base].__name__)


@functools.cache
def folder() -> str:
    """Return a temporary folder on sys.path. It is deleted when the process ends."""
    path = tempfile.mkdtemp(prefix="mutants-")
    atexit.register(shutil.rmtree, path)
    sys.path.append(path)
    return path


@functools.cache
def mutants() -> list[Mutant]:
    """Return all mutants, in the same order each time.

    Left out are mutants that do not compile, that read an attribute which the base lacks, or
    that have the source of the base or of another mutant.
    """
    found: dict[str, Mutant] = {}
    for base, norm in BASES.items():
        tree = ast.parse(Path(inspect.getfile(norm)).read_text())
        original = ast.unparse(tree)
        sources = {original}
        for operator, line, description, source in changed_sources(tree):
            unknown = set(STATE.findall(source)) - set(STATE.findall(original))
            if source in sources or unknown or not compiles(source):
                continue
            sources.add(source)
            name = f"{base}.{operator}.{line}:{textwrap.shorten(description, 100)}"
            # The same change of two places in one line.
            while name in found:
                name += "'"
            found[name] = Mutant(name, source, original)
    return list(found.values())


def changed_sources(tree: ast.Module) -> Iterator[tuple[str, int, str, str]]:
    """Yield the operator, the line, a description and the changed source of each change."""
    for node, function, put in places(tree):
        for name, operator in OPERATORS.items():
            for description, replacement in operator(node, function):
                put(replacement)
                source = ast.unparse(tree)
                put(node)
                yield name, node.lineno, description, source


def places(
    parent: ast.AST, function: ast.FunctionDef | None = None
) -> Iterator[tuple[ast.AST, ast.FunctionDef | None, Callable[[ast.AST], None]]]:
    """Yield the nodes that are mutated, each with its function, and a function that replaces it."""
    for field, value in ast.iter_fields(parent):
        if isinstance(value, list):
            children = [(child, partial(value.__setitem__, i)) for i, child in enumerate(value)]
        else:
            children = [(value, partial(setattr, parent, field))]
        for child, put in children:
            if not isinstance(child, ast.AST) or is_skipped(child):
                continue
            own_function = child if isinstance(child, ast.FunctionDef) else function
            if hasattr(child, "lineno"):
                yield child, own_function, put
            yield from places(child, own_function)


def is_skipped(node: ast.AST) -> bool:
    """Return whether mutants of a node are useless.

    Another default value of an argument is not a mistake, a wrong shape is an error at once, and
    which arguments a constructor refuses is not a property of a layer.
    """
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).endswith("shape")
    if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
        return "num_" in ast.unparse(node.test)
    return isinstance(node, ast.arguments | ast.Raise)


def compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True
