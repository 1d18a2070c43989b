"""How an inherited test reports a failure: what is wrong, and where to look for the cause."""

from collections.abc import Iterable
from typing import Any, NoReturn

import pytest

from bn_lightning import lookup
from bn_lightning.errors import describe_error

MOST_NAMES, MOST_LINES = 5, 4


def fail(what: str, where: str) -> NoReturn:
    """Fail the running test, without a traceback and without an error that is being handled."""
    raise pytest.fail.Exception(f"{what}\nLook at: {where}", pytrace=False) from None


def fail_if(wrong: list[str], what: str, where: str) -> None:
    """Fail the running test if anything is wrong, and list it."""
    if wrong:
        fail(f"{what}:\n{listed(wrong)}", where)


def describe(error: Exception) -> str:
    """Return an error in one line, and the line of the user's code that raised it."""
    return "\n".join([describe_error(error), *lookup.users_lines(error)[-1:]])


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 training sample`."""
    return f"{number:,} {noun} sample{'s' * (number != 1)}"


def shown(values: Iterable[Any]) -> str:
    """Return the first values in one line, and the number of the others."""
    first, more = _shortened(values, MOST_NAMES)
    return ", ".join(first) + (f" and {more:,} more" if more else "")


def listed(values: Iterable[Any]) -> str:
    """Return the first values in indented lines, and the number of the others."""
    first, more = _shortened(values, MOST_LINES)
    return "\n".join(f"    {line}" for line in [*first, *[f"and {more:,} more"] * bool(more)])


def found(values: list[str]) -> str:
    """Return the end of a message: what was found at the place to look at, or nothing."""
    return f" Found:\n{listed(values)}" if values else ""


def _shortened(values: Iterable[Any], most: int) -> tuple[list[str], int]:
    """Return the first values as text, and the number of the others."""
    texts = [str(value) for value in values]
    return texts[:most], max(0, len(texts) - most)
