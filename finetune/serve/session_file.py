"""The file of `generate --session`: looked at and held before anything slow is imported, so that no
conversation is computed that could not be kept."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from finetune.kept import FileLock, make_folder, write_whole
from finetune.serve.options import FRAMES_PER_SEC, GenerateOptions, Part

logger = logging.getLogger(__name__)

FORMAT = "moshi-ttt session 1"
_MAX_HEADER_BYTES = 2**24
_WHAT = {"all": "all of the conversation", "memory": "what TTT has learned"}


class SessionFile:
    """The file of one conversation, which this process alone goes on with; see `held_session`.

    Args:
        part: what is to be kept in it.
        metadata: of the session that it holds; None: there is none yet.
    """

    def __init__(self, path: Path, part: Part, metadata: dict[str, str] | None) -> None:
        self.path, self.part, self._metadata = path, part, metadata

    @property
    def is_begun(self) -> bool:
        """Return whether there is a conversation to go on with."""
        return self._metadata is not None

    def announce(self) -> None:
        """Say whether a conversation begins or goes on: a misspelled name begins one."""
        if self._metadata is None:
            logger.info("begins a new session in %s", self.path)
        elif part_of(self._metadata) == "memory":
            logger.info("goes on with the memory in %s: what TTT has learned", self.path)
        else:
            logger.info("goes on with %s, %.1f s old", self.path, _age_sec(self._metadata))

    def keep(self, content: bytes, num_frames: int, answer: Path) -> str:
        """Keep where the conversation has ended; return what is to be said if that fails.

        Args:
            answer: its folder is where a session goes for which there is no room.
        """
        try:
            write_whole(self.path, content)
        except UserError as error:
            there = f" The answer is in {answer}." if answer.exists() else ""
            return self._explain_unsaved(f"--session: {error}{there}", content, answer)
        age_sec = num_frames / FRAMES_PER_SEC
        logger.info("saved %s: %s, %.1f s old", self.path, _WHAT[self.part], age_sec)
        return ""

    def _explain_unsaved(self, reason: str, content: bytes, answer: Path) -> str:
        name = f"{self.path.stem}-{os.getpid()}{self.path.suffix or '.session'}"
        for folder in (answer.parent, Path(tempfile.gettempdir())):
            try:
                write_whole(folder / name, content)
            except UserError:
                continue  # the reason is that of the place that was asked for
            return (
                f"{reason} The conversation is kept in {folder / name} instead: move it to "
                f"{self.path} to go on with it."
            )
        before = f" {self.path} holds it as it was before this recording." if self.is_begun else ""
        return f"{reason} Where the conversation stands is lost, as no other place took it.{before}"


@contextmanager
def held_session(options: GenerateOptions) -> Iterator[SessionFile | None]:
    """Hold the file of `--session`, and look at what it has; None: no session is asked for.

    Raises:
        UserError: nothing can be kept there, another process goes on with it, it holds no session,
            or more than what would replace it.
    """
    path = options.session
    if path is None:
        yield None
        return
    lock = FileLock(
        path.with_name(f".{path.name}.lock"),
        f"--session: {path}",
        "Wait until that has ended, or give another file: each would replace what the other keeps.",
        is_removed=True,
    )
    with lock:
        try:
            make_folder(path.parent)
            lock.take()
        except OSError as error:
            raise UserError(
                f"--session: nothing can be kept in {path.parent} ({error.strerror or error}); "
                "name a file in a folder that can be written to."
            ) from None
        yield SessionFile(path, options.session_part, _metadata_in(path, options.session_part))


def _metadata_in(path: Path, part: Part) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), _MAX_HEADER_BYTES))
    except OSError as error:
        raise UserError(f"--session: {path} cannot be read ({error.strerror}).") from None
    metadata = metadata_of(start, f"--session: {path}")
    if part == "memory" and part_of(metadata) == "all":
        raise UserError(
            f"--session_part: {path} holds all of a conversation, {_age_sec(metadata):.1f} s old, "
            "which what TTT has learned alone would replace; leave --session_part out, or give "
            "another --session."
        )
    return metadata


def metadata_of(content: bytes, source: str) -> dict[str, str]:
    """Return what the header of a session says, of which `content` is the beginning.

    Args:
        source: where the content is from, for messages.

    Raises:
        UserError: it is no session.
    """
    size = int.from_bytes(content[:8], "little")
    try:
        if not 0 < size <= min(_MAX_HEADER_BYTES, len(content) - 8):
            raise ValueError
        header = json.loads(content[8 : 8 + size])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{source} is no session; `moshi-ttt generate` and the page save such."
        ) from None
    return dict(metadata)


def part_of(metadata: dict[str, str]) -> Part:
    return "memory" if metadata.get("part") == "memory" else "all"


def num_frames_of(metadata: dict[str, str]) -> int:
    """Return how many frames of the conversation were heard.

    Raises:
        ValueError, KeyError: the header does not say it.
    """
    return max(int(metadata["num_frames"]), 0)


def _age_sec(metadata: dict[str, str]) -> float:
    try:
        return num_frames_of(metadata) / FRAMES_PER_SEC
    except (ValueError, KeyError):
        return 0.0  # that it is damaged is found when all of it is read
