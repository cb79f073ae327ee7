"""What can be wrong with one file of a data set."""


class FileProblem(Exception):
    """One recording or transcript cannot be used: what is wrong with it and what to do.

    Never reaches the user as an exception: the loaders name the file and the line, and turn it
    into a `UserError` or a warning, as `data.on_error` says.
    """
