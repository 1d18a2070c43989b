"""Output for terminals: the program's name, printable text, and tables."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# The zero-width joiners are part of words in Persian and Hindi, for example.
JOINERS = "\u200c\u200d"

_program: str | None = None


def program() -> str:
    """Return the name of the program for messages and usage.

    This is `python -m PACKAGE`, or the name of a console script. Workers get the name
    from their parent process with `set_program`.
    """
    if _program is not None:
        return _program
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def set_program(name: str | None) -> None:
    """Set the name that `program` returns; None restores the name of this process."""
    global _program
    _program = name


def printable(text: str) -> str:
    r"""Return one line of text in which unprintable characters are escaped, as in `\x1b[31m`.

    A name in a file of another person may contain control characters, with which a
    terminal would move the cursor or hide text.
    """
    # Python does not count control and format characters, line breaks and lone
    # surrogates as printable.
    return "".join(
        char if char.isprintable() or char in JOINERS else ascii(char)[1:-1] for char in text
    )


def printable_lines(text: str) -> str:
    """Return text of several lines in which each line is `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def enumerated(names: Iterable[str], limit: int) -> str:
    """Return names, separated by commas, and the number of those after the first `limit`."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], folds: int = 0) -> str:
    """Return a table as text. The header is bold on a terminal unless NO_COLOR is set.

    Each cell is made `printable`. Columns of numbers are right-aligned. If the terminal
    is too narrow, the column with the index `folds` is wrapped.
    """
    # Imported here because `--help` must be fast and prints no table.
    from rich.console import Console
    from rich.table import Table

    columns = [printable(column) for column in columns]
    rows = [[printable(str(cell)) for cell in row] for row in rows]
    layout = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        starts = {row[number][:1] for row in rows}
        are_numbers = number and all(sign.isdigit() or sign in ("-", "") for sign in starts)
        wrapping: dict[str, Any] = {"overflow": "fold"} if number == folds else {"no_wrap": True}
        layout.add_column(column, justify="right" if are_numbers else "left", **wrapping)
    for row in rows:
        layout.add_row(*row)
    # A file or pipe has no width, and rich would assume 80 columns.
    width = None if sys.stdout.isatty() else 500
    # Markup and emoji are off because paths may contain brackets and colons.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as printed:
        console.print(layout)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], folds: int = 0) -> None:
    """Print the `table` to stdout."""
    print(table(columns, rows, folds), flush=True)
