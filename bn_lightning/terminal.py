"""What a person sees at a terminal: the program's name, and tables."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_program: str | None = None


def program() -> str:
    """Return the command that was run, as a user would type it.

    That is `python -m PACKAGE`, or the name of a console script. A process that another one has
    started, such as a worker, was told it: see `set_program`.
    """
    if _program is not None:
        return _program
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def set_program(name: str | None) -> None:
    """Set what `program` returns; None is what this process was started with."""
    global _program
    _program = name


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], folds: int = 0) -> str:
    """Format a table, with a bold header where stdout is a terminal and NO_COLOR is not set.

    Columns of numbers are aligned to the right. Where the terminal is too narrow, the column
    number `folds` is folded.
    """
    # Imported here: --help prints no table, and has to be fast.
    from rich.console import Console
    from rich.table import Table

    rows = [list(map(str, row)) for row in rows]
    layout = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        starts = {row[number][:1] for row in rows}
        are_numbers = number and all(sign.isdigit() or sign in ("-", "") for sign in starts)
        shape: dict[str, Any] = {"overflow": "fold"} if number == folds else {"no_wrap": True}
        layout.add_column(column, justify="right" if are_numbers else "left", **shape)
    for row in rows:
        layout.add_row(*row)
    # A file or a pipe has no width of its own, and paths are longer than 80 characters.
    width = None if sys.stdout.isatty() else 500
    # Without markup and emoji, since paths may contain brackets and colons.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as printed:
        console.print(layout)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], folds: int = 0) -> None:
    """Print the `table` to stdout."""
    print(table(columns, rows, folds), flush=True)
