"""Failures of inherited tests, in the terms of the user."""

import traceback
from typing import NoReturn

import pytest


def fail(what: str, where: str) -> NoReturn:
    """Let the running test fail, and say what is wrong and where to look for the cause."""
    __tracebackhide__ = True
    pytest.fail(f"{what}\nLook at: {where}", pytrace=False)


def text_of(error: Exception) -> str:
    """Return the first lines of an error, and the line of code that raised it."""
    lines = str(error).strip().splitlines()[:3]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(lines)} ({place.filename}, line {place.lineno})"
