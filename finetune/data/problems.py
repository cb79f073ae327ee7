"""A file of a data set may be unusable."""


class FileProblem(Exception):
    """Error of one recording or transcript that cannot be used: what is wrong with it and what to
    do.

    Never reaches the user as an exception: the loaders name the file and the line, and turn it
    into a `UserError` or a warning, as `data.on_error` says.

    Args:
        what: a clause that names the file.
        remedy: what to do about it.
        code: the kind of the problem, a stable name in kebab case.
    """

    def __init__(self, what: str, remedy: str, *, code: str = "unreadable") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        self.code = code

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"
