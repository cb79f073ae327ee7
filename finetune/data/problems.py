"""A file of a data set may be unusable."""

COPY_REMEDY = "copy or convert it again"


class FileProblem(Exception):
    """Error of one recording or transcript that cannot be used: what is wrong with it and what to
    do.

    Never reaches the user as an exception: the loaders name the file and the line, and turn it
    into a `UserError` or a warning, as `data.on_error` says.

    Args:
        what: a clause that names the file.
        remedy: what to do about it.
        code: the kind of the problem, a stable name in kebab case.
        may_be_left_out: one may also do without the recording. How is known where it was found:
            see `found_in_list`.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        *,
        code: str = "unreadable",
        may_be_left_out: bool = False,
    ) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        self.code = code
        self.may_be_left_out = may_be_left_out

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"

    def found_in_list(self, leave_out: str) -> "FileProblem":
        """Return it with one more remedy, if the recording may be left out.

        Args:
            leave_out: how, as in "remove its line"; empty: nothing lists the recording.
        """
        if not (self.may_be_left_out and leave_out):
            return self
        return FileProblem(self.what, f"{self.remedy}, or {leave_out}", code=self.code)


def damaged(what: str, *, code: str = "unreadable") -> FileProblem:
    """Return the error of a recording that is not as it was made."""
    return FileProblem(what, COPY_REMEDY, code=code, may_be_left_out=True)
