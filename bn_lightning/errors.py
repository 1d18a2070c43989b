"""The one exception for what a user can mend."""


class UserError(ValueError):
    """A mistake in a setting or a file.

    The message names what was given, what is allowed and what to do; the command line prints it alone, with no
    stack trace, and exits with 2.
    """
