"""A layout of data on disk."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

from finetune.data.reading import Reading
from finetune.data.recording import Recording


class Entry(NamedTuple):
    """An entry of a source, before anything is opened: a recording, or why it names none."""

    origin: str
    recording: Recording | None
    problem: str = ""


class Source(ABC):
    """The data at one path of `data.train_data`, in one layout.

    It lists recordings; how one is read is the recording's own business (`Recording`), which
    travels to the processes that read.
    """

    def __init__(self, path: Path, key: str, reading: Reading) -> None:
        """
        Args:
            key: the configuration's key that names the path, for messages.
            reading: what recordings of audio files are to do with what is in them.
        """
        self.path = path
        self.key = key
        self.reading = reading

    @classmethod
    @abstractmethod
    def reads(cls, path: Path) -> bool:
        """Return whether data of this layout is at a path, by names alone.

        A layout whose paths name no files has a suffix of its own, or `…://`: what has neither is
        taken for missing when it is not on the disk.
        """

    @abstractmethod
    def entries(self) -> list[Entry]:
        """List what is there, in a fixed order, without opening a recording.

        Raises:
            UserError: the path does not exist, holds nothing, or cannot be read as this layout.
        """
