"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a file, a key or a command: the message names it and says what to do.

    Entry points print the message alone, without a traceback, and exit with status 1.
    """
