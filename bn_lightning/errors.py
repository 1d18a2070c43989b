"""The exceptions whose message is all that a user has to see, and others in one line."""


class UserError(ValueError):
    """A mistake in a setting or a file.

    The message names what was given, what is allowed and what to do; the command line prints it alone, with no
    stack trace, and exits with `exit_code`.
    """

    exit_code = 2


class RunFailed(UserError):
    """A run that was begun and cannot go on: a full disk, a loss that is no number, a process that has gone."""

    exit_code = 1


def describe_error(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
