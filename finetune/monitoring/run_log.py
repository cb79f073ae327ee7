"""What a run says, kept in its folder."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

from finetune.errors import UserError
from finetune.monitoring.appended import AppendedLines
from finetune.monitoring.console import LineFormatter
from finetune.safety import redact

logger = logging.getLogger(__name__)

NAME = "log.train.txt"


class RunLog(logging.Handler):
    """Writes log lines to `log.train.txt` of a run's folder: the terminal's are gone with it.

    Lines that come before the folder is the run's are kept until `open`. A full disk ends nothing.

    Args:
        enabled: false on every process but the first, which then writes nothing.
    """

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        self._enabled = enabled
        self._early: list[str] = []
        self._file: AppendedLines | None = None
        if enabled:
            logging.getLogger().addHandler(self)

    def open(self, run_dir: Path, *, is_new: bool) -> None:
        """Begin the file, with what was said so far.

        Args:
            is_new: whether what is in it goes.

        Raises:
            OSError: it cannot be written.
        """
        if self._enabled:
            self._file = AppendedLines(run_dir / NAME, is_new=is_new)
            for line in self._early:
                self._file.append(line)
            self._early.clear()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = redact(self.format(record))
        except Exception:  # a library's mistake in its message; logging says so, and goes on
            self.handleError(record)
            return
        if self._file is None:
            self._early.append(line)
            return
        try:
            self._file.append(line)
        except OSError as problem:  # not for want of room
            logging.getLogger().removeHandler(self)
            logger.warning("%s: %s. It ends here.", self._file.path, problem.strerror)

    def end(self, error: BaseException | None) -> None:
        """Write what has ended the run, if it was an error, and close the file."""
        logging.getLogger().removeHandler(self)
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if error is not None:
                file.append(redact(_told(error)))
            file.close()
        except OSError as problem:
            logger.warning("%s: %s. Its last lines are lost.", file.path, problem.strerror)


def _told(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, Exception):
        return "".join(traceback.format_exception(error)).rstrip()
    return type(error).__name__
