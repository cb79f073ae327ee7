"""moshi-finetune's layout: a `.jsonl` of stereo files, or of two mono files a dialogue, with
transcripts beside them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.config import require_sources
from finetune.data.audio_recording import AudioRecording
from finetune.data.layouts.base import Entry, Source
from finetune.data.lines import parse_line
from finetune.data.problems import FileProblem
from finetune.data.reading import Reading
from finetune.data.sides import Sides
from finetune.data.transcripts import (
    MAIN_SPEAKER,
    OTHER_SPEAKER,
    Transcript,
    Word,
    in_capitals,
    load_transcript,
)
from finetune.errors import UserError, counted
from finetune.safety import is_recording_name, path_problem, read_text, shown

logger = logging.getLogger(__name__)

_LINE = '{"path": "a.wav", "duration": 12.3}'


@dataclass(frozen=True)
class StereoFile(AudioRecording):
    """A stereo file; the words are in a `.json` of the same name."""

    @property
    def sides(self) -> Sides:
        return Sides.of_stereo(self.path, self.reading.main_channel)

    @property
    def transcript_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def text_name(self) -> str:
        return f"transcript {self.transcript_path}"

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, self.transcript_path)

    @property
    def own_transcripts(self) -> tuple[tuple[Path, Path], ...]:
        return ((self.path, self.transcript_path),)

    def load_transcript(self) -> Transcript:
        return load_transcript(self.transcript_path)


@dataclass(frozen=True)
class MonoPair(AudioRecording):
    """Two mono files, Moshi's and the user's.

    The words are in a `.json` of the same name beside each. If there is one beside Moshi's alone,
    it holds those of both, as beside a stereo file.
    """

    user_path: Path = field(kw_only=True)

    @property
    def location(self) -> str:
        return self.sides.location

    @property
    def title(self) -> str:
        return f"{self.path} + {self.user_path}"

    @property
    def sides(self) -> Sides:
        return Sides.of_two(self.path, self.user_path)

    @property
    def transcript_paths(self) -> tuple[Path, Path]:
        """Return the transcripts of Moshi and of the user, which may not be there."""
        return self.path.with_suffix(".json"), self.user_path.with_suffix(".json")

    @property
    def text_name(self) -> str:
        return f"transcript {self.transcript_paths[0]}"

    @property
    def files(self) -> tuple[Path, ...]:
        moshi, user = self.transcript_paths
        there = (user,) if user.exists() else ()
        return (self.path, self.user_path, moshi, *there)

    @property
    def own_transcripts(self) -> tuple[tuple[Path, Path], ...]:
        return tuple(zip(self.audio_files, self.transcript_paths, strict=True))

    @property
    def audio_files(self) -> tuple[Path, ...]:
        return (self.path, self.user_path)

    def moved(self, places: Mapping[Path, Path]) -> "MonoPair":
        moshi, user = (places.get(path, path) for path in self.audio_files)
        return replace(self, path=moshi, user_path=user)

    def load_transcript(self) -> Transcript:
        moshi = load_transcript(self.transcript_paths[0])
        path = self.transcript_paths[1]
        if not path.exists() and in_capitals(path) is None:
            return moshi
        user = load_transcript(path)
        words = [
            *self._of_one(moshi, self.transcript_paths[0], MAIN_SPEAKER),
            *self._of_one(user, self.transcript_paths[1], OTHER_SPEAKER),
        ]
        return Transcript(words, moshi.unused | user.unused)

    def _of_one(self, found: Transcript, path: Path, speaker: str) -> list[Word]:
        """Return the words of a file of one speaker, whatever it calls that one."""
        speakers = {word.speaker for word in found.words}
        if MAIN_SPEAKER in speakers and len(speakers) > 1:
            raise FileProblem(
                f"transcript {path} holds words of {MAIN_SPEAKER} and of others, but both files of "
                "the dialogue have a transcript",
                f"remove {self.transcript_paths[1]} if {self.transcript_paths[0]} holds the words "
                "of both; else leave in each the words of its own file",
                code="transcript-malformed",
            )
        return [word._replace(speaker=speaker) for word in found.words]


class JsonlSource(Source):
    """A `.jsonl` with a line `{"path": "a.wav", "duration": 12.3}` for each recording, and
    `"user_path": "b.wav"` where the user has a file of its own; or a folder of such files, at any
    depth."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        return True

    def entries(self) -> list[Entry]:
        return [entry for file in self._files() for entry in _entries_of(file, self.reading)]

    def _files(self) -> list[Path]:
        path = self.path
        require_sources([path], self.key)
        if not path.is_dir():
            return [path]
        found = sorted(path.rglob("*.jsonl"))
        # What macOS and editors leave in a folder is no data: ._a.jsonl, .ipynb_checkpoints/.
        files = [f for f in found if not any(p[0] == "." for p in f.relative_to(path).parts)]
        if len(files) < len(found):
            hidden = counted(len(found) - len(files), "hidden file is", "hidden files are")
            logger.info("%s: %s passed over", path, hidden)
        if not files:
            hidden = " that is not hidden" if found else ""
            raise UserError(f"{self.key}: the folder {path} holds no .jsonl file{hidden}.")
        return files


def _entries_of(jsonl: Path, reading: Reading) -> list[Entry]:
    try:
        texts = read_text(jsonl).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{jsonl} cannot be read as text: {error}") from None
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise UserError(f"{jsonl} is empty: it needs one line {_LINE} for each recording.")
    return [_entry(jsonl, number, text, reading) for number, text in numbered]


def _hint(line: str) -> str:
    if '"supervisions"' not in line:
        return ""
    return "; if it is a manifest of lhotse, give it a name such as cuts.jsonl.gz"


def _entry(jsonl: Path, number: int, text: str, reading: Reading) -> Entry:
    origin = f"{jsonl}:{number}"
    try:
        fields = parse_line(text, {"path": "text", "duration": "a number"}, {"user_path": "text"})
    except ValueError as error:
        expected = f"expected {_LINE} (seconds){_hint(text)}"
        return Entry(origin, None, f"malformed line: {error}: {expected}")
    names, promised_sec = [fields["path"]], fields["duration"]
    if fields.get("user_path") is not None:
        names.append(fields["user_path"])
    for name in names:
        if (wrong := path_problem(name)) is not None:
            return Entry(origin, None, f"the path {wrong}")
        if not is_recording_name(name):
            problem = (
                f"the path {shown(name)} leads out of the folder of {jsonl.name}: put that file "
                f"above the recordings, or give absolute paths"
            )
            return Entry(origin, None, problem)
    path, *user = (jsonl.parent / name for name in names)
    if not user:
        return Entry(origin, StereoFile(path, names[0], origin, promised_sec, reading))
    # The keys say who is who; there is no channel to be told apart.
    reading = replace(reading, main_channel="left")
    return Entry(
        origin,
        MonoPair(path, " + ".join(names), origin, promised_sec, reading, user_path=user[0]),
    )
