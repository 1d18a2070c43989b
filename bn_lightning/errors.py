"""The exceptions whose message is all that a user has to see."""


class UserError(ValueError):
    """A mistake in a setting or a file.

    The message names what was given, what is allowed and what to do; the command line prints it alone, with no
    stack trace, and exits with `exit_code`.
    """

    exit_code = 2


class RunFailed(UserError):
    """A run that was begun and cannot go on: a full disk, a loss that is no number, a process that has gone."""

    exit_code = 1
