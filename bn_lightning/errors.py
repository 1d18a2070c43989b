"""Exceptions that the command line reports without a stack trace."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An invalid setting or file.

    The message states what was given, what is allowed and what to do. The command line
    prints only the message, without a stack trace, and exits with `exit_code`.
    """

    exit_code = 2


class RunFailed(UserError):
    """A failure of a run after its start, such as a full disk, a NaN loss or a killed process."""

    exit_code = 1


def describe_error(error: Exception) -> str:
    """Return the class name of an error and the first line of its message."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def report_failure(consequence: str) -> Iterator[None]:
    """Turn an exception into one line on stderr.

    This is for code that only observes a run or shows its results: its failure must not
    cost the result.

    Args:
        consequence: what the user does not get, such as `curves.png cannot be drawn`.
    """
    try:
        yield
    except Exception as error:
        print(f"WARNING: {consequence}: {describe_error(error)}", file=sys.stderr, flush=True)
