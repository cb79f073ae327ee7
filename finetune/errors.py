"""What tells a user of a mistake: the one exception that means "the user can fix this", and its
grammar."""


class UserError(ValueError):
    """A mistake in a file, a key or a command: the message names it and says what to do.

    Entry points print the message alone, without a traceback, and exit with status 1.
    """


def counted(number: int, noun: str, several: str | None = None) -> str:
    """Return "1 file", "2 files", as a message counts things.

    Args:
        noun: what follows the number 1, as "file", or "file is" with its verb.
        several: what follows all others; None: `noun` with an "s".
    """
    return f"{number} {noun if number == 1 else several or f'{noun}s'}"
