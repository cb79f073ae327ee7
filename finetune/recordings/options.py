"""Options of the commands `moshi-ttt data …`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from finetune.config import (
    CONFIGURATION,
    DATA,
    FILE,
    FOLDER,
    POSITIONAL,
    SOURCE,
    WRITABLE,
    WRITABLE_FOLDER,
    FilePath,
    PngPath,
)
from finetune.errors import UserError
from finetune.kept import Output

Workers = Annotated[int, Ge(1), Le(1024)]
CHECK, SHOW, STATS = "data check", "data show", "data stats"
"""Commands that mark what they write."""


@dataclass(frozen=True)
class IndexOptions:
    folder: Annotated[FilePath, POSITIONAL, FOLDER]
    """The folder with the recordings, at any depth."""

    out: Annotated[FilePath | None, WRITABLE] = None
    """The JSONL to write; null: FOLDER/data.jsonl."""

    pair: str | None = None
    """How the two mono files of a dialogue are called, Moshi's first, with {id} for what they have
    in common: '{id}_left.wav,{id}_right.wav' or 'moshi/{id}.wav,user/{id}.wav'. They are listed as
    they are; other files are not listed."""

    join: bool = False
    """With --pair: write a stereo file for each two mono files, and list that."""

    joined_dir: Annotated[FilePath | None, WRITABLE_FOLDER] = None
    """With --join: where joined recordings go; null: FOLDER/stereo."""

    overwrite: bool = False
    """Replace a JSONL and joined recordings that are there already. Texts and transcripts beside a
    joined recording that somebody has changed stay where its two files are the same as before; else
    they are moved aside, as `NAME.json.before`."""

    @property
    def jsonl(self) -> Path:
        """The JSONL that is written."""
        return self.out or self.folder / "data.jsonl"

    def outputs(self) -> list[Output]:
        return [Output(self.jsonl)]

    def check(self) -> None:
        """Check the options against one another.

        Raises:
            UserError: one of them means nothing without another, or training reads no such list.
        """
        if self.jsonl.suffix != ".jsonl":
            raise UserError(
                f"--out {self.jsonl}: its name must end in .jsonl, as training asks for."
            )
        for option, needs, is_missing in (
            ("--join", "--pair", self.join and self.pair is None),
            ("--joined_dir", "--join", self.joined_dir is not None and not self.join),
        ):
            if is_missing:
                raise UserError(f"{option} goes with {needs}. Add that, or leave {option} out.")


@dataclass(frozen=True)
class AnnotateOptions:
    data: Annotated[FilePath, POSITIONAL, DATA]
    """The JSONL of the recordings, as `moshi-ttt data index` writes it; or a run's YAML file, for
    its training data."""

    engine: Literal["align", "whisper"] = "align"
    """`align`: find the times of words that are known, from English texts beside each recording.
    `whisper`: recognize the words too, with faster-whisper."""

    main_channel: Literal["left", "right"] | None = None
    """Where Moshi is; null: where `data.main_channel` of a run's YAML file says, else left."""

    overwrite: bool = False
    """Make transcripts again that are there already."""

    workers: Workers | None = None
    """Processes of `align`; null: one for each core."""

    model: str = "small"
    """For `whisper`: a folder with a model for faster-whisper, or the name of one to download."""

    language: str | None = None
    """For `whisper`: the language, such as en or fr; null: it is recognized, channel by channel."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """For `whisper`: where to compute; `auto`: on the GPU if there is one."""


@dataclass(frozen=True)
class CheckOptions:
    data: Annotated[FilePath, POSITIONAL, DATA]
    """A JSONL, or a run's YAML file, whose training and evaluation data are checked."""

    fast: bool = False
    """Look at headers, transcripts and a few words of each recording alone, as a run does at its
    start; otherwise all audio is listened to."""

    tokenizer: Annotated[FilePath | None, FILE] = None
    """A sentencepiece model, to check the text tokens; null: that of the run, if DATA is a YAML
    file and the tokenizer is on this machine."""

    json: Annotated[FilePath | None, WRITABLE] = None
    """A JSON file to write with all that was found."""

    html: Annotated[FilePath | None, WRITABLE] = None
    """An HTML page to write with all that was found."""

    cache: FilePath | None = None
    """A file that keeps results, so that recordings that have not changed are not checked again;
    null: `.NAME.checked` beside DATA."""

    workers: Workers | None = None
    """Processes; null: one for each core."""

    @property
    def ledger(self) -> Path:
        """Return the file that results are kept in."""
        data = self.data.resolve()
        return self.cache or data.with_name(f".{data.name}.checked")

    def outputs(self) -> list[Output]:
        # By its name, the file beside DATA is one of results, whatever has happened to it.
        is_own = _is_named if self.cache is None else _holds_results
        kept = Output(self.ledger, "--cache", CHECK, is_own=is_own, is_needed=False)
        written = (self.json, "--json"), (self.html, "--html")
        return [kept, *(Output(path, name, CHECK) for path, name in written if path is not None)]


_RESULT = re.compile(rb'\["[0-9a-f]{24}"')
"""How a line of a file of results begins: with a key."""
_CUT_OFF = re.compile(rb'(\[("[0-9a-f]{0,24})?)?\n?')
"""A line that was cut off before its key was there."""
_LINE_BYTES = 4096


def _is_named(_: Path) -> bool:
    return True


def _holds_results(path: Path) -> bool:
    """Return whether a file has results in it, or would have if nothing had cut it off."""
    try:
        with path.open("rb") as file:
            are_cut_off = True
            while line := file.readline(_LINE_BYTES):
                if _RESULT.match(line):
                    return True
                are_cut_off = are_cut_off and _CUT_OFF.fullmatch(line) is not None
    except OSError:
        return True  # nor can it be written, of which there is a warning
    return are_cut_off


@dataclass(frozen=True)
class ShowOptions:
    file: Annotated[FilePath, POSITIONAL, SOURCE]
    """The JSONL."""

    index: Annotated[int, Ge(0), Le(10**9)] = 0
    """Which of its recordings, counted from 0."""

    start_sec: Annotated[float, Ge(0), Le(1e7)] = 0.0
    """Where the segment starts; rounded down to a whole frame of 80 ms."""

    duration_sec: Annotated[float, Ge(0.5), Le(120)] = 12.0
    """How long the segment is."""

    config: Annotated[FilePath | None, CONFIGURATION] = None
    """A run's YAML file whose files are on this machine: its text tokens, codes and loss weights
    are shown as well."""

    out: Annotated[PngPath, WRITABLE] = Path("segment.png")
    """The picture to write, a PNG; the sound goes beside it, as a stereo wav. Those of an earlier
    call are replaced."""

    @property
    def sound(self) -> Path:
        """Return the file that the sound goes to."""
        return self.out.with_suffix(".wav")

    def outputs(self) -> list[Output]:
        return [Output(path, command=SHOW) for path in (self.out, self.sound)]


@dataclass(frozen=True)
class StatsOptions:
    data: Annotated[FilePath, POSITIONAL, DATA]
    """A JSONL, or a run's YAML file, whose training and evaluation data are counted."""

    tokenizer: Annotated[FilePath | None, FILE] = None
    """A sentencepiece model, to count text tokens; null: that of the run, if DATA is a YAML file
    and the tokenizer is on this machine."""

    out: Annotated[PngPath | None, WRITABLE] = None
    """A PNG to draw the distributions into."""

    workers: Workers | None = None
    """Processes; null: one for each core."""

    def outputs(self) -> list[Output]:
        return [Output(self.out, command=STATS)] if self.out is not None else []
