"""Cuts of `lhotse`: a manifest in JSON lines, with a dialogue of two channels in each line."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config import require_sources
from finetune.data.audio_recording import AudioRecording
from finetune.data.layouts.base import Entry, Source
from finetune.data.layouts.tables import WORDS, require_package
from finetune.data.sides import Channel, Sides
from finetune.data.transcripts import (
    MAIN_SPEAKER,
    OTHER_SPEAKER,
    Transcript,
    transcript_of,
)
from finetune.errors import UserError
from finetune.safety import parse_json, read_text

if TYPE_CHECKING:
    from lhotse.cut import MultiCut


@dataclass(frozen=True)
class CutOfTwo(AudioRecording):
    """A cut of two channels.

    Args:
        manifest: the file that lists it.
        where: its sides.
        words: its transcript, as JSON, packed so that it travels lightly.
    """

    manifest: Path = field(kw_only=True)
    where: Sides = field(kw_only=True)
    words: str = field(kw_only=True, compare=False, repr=False)

    leave_out = "remove its cut"

    @property
    def location(self) -> str:
        return self.where.location

    @property
    def part(self) -> tuple[str, float, float]:
        start, duration = self.where.start_sec, self.where.duration_sec
        whole = replace(self.where, start_sec=0.0, duration_sec=None)
        return whole.location, start, math.inf if duration is None else start + duration

    @property
    def title(self) -> str:
        return f"{self.manifest}/{self.path_as_written}"

    @property
    def sides(self) -> Sides:
        return self.where

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.manifest, *self.audio_files)

    @property
    def audio_files(self) -> tuple[Path, ...]:
        return tuple(file for file in self.where.files if isinstance(file, Path))

    def moved(self, places: Mapping[Path, Path]) -> "CutOfTwo":
        moshi, user = (
            side._replace(file=places.get(side.file, side.file))
            if isinstance(side.file, Path)
            else side
            for side in (self.where.moshi, self.where.user)
        )
        return replace(self, where=replace(self.where, moshi=moshi, user=user))

    def audio_version(self) -> tuple[object, ...] | None:
        version = super().audio_version()
        where = self.where
        part = where.moshi.number, where.user.number, where.start_sec, where.duration_sec
        return None if version is None else (*version, part)

    @property
    def words_version(self) -> tuple[object, ...]:
        return (self.words,)

    def load_transcript(self) -> Transcript:
        return transcript_of(json.loads(self.words), self.text_name)


class LhotseSource(Source):
    """A manifest of cuts, `cuts.jsonl.gz` for example: `cuts` stands in its name, by itself."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        name = path.name.removesuffix(".gz")
        if not name.endswith(".jsonl"):
            return False
        words = "".join(c if c.isalnum() else " " for c in name.removesuffix(".jsonl")).split()
        return "cuts" in words

    def entries(self) -> list[Entry]:
        require_sources([self.path], self.key)
        require_package("lhotse", self.path, "lhotse")
        try:
            lines = read_text(self.path).split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be read as text: {error}") from None
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not numbered:
            raise UserError(f"{self.path} is empty: it is to have a cut in each line.")
        return [self._entry(number, line) for number, line in numbered]

    def _entry(self, number: int, line: str) -> Entry:
        from lhotse.cut import MultiCut
        from lhotse.serialization import deserialize_item

        origin = f"{self.path}:{number}"
        try:
            cut = deserialize_item(parse_json(line))
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            problem = f"malformed line, not a cut of lhotse ({type(error).__name__}: {error})"
            return Entry(origin, None, f"{problem}: write the manifest again with CutSet.to_file")
        if not isinstance(cut, MultiCut) or len(cut.channel) != 2:
            return Entry(
                origin,
                None,
                f"it is a {type(cut).__name__}, and a dialogue is a MultiCut of two channels: "
                "CutSet.from_manifests makes these of recordings of two channels",
            )
        try:
            return Entry(origin, self._recording(cut, origin))
        except _Unusable as problem:
            return Entry(origin, None, str(problem))

    def _recording(self, cut: "MultiCut", origin: str) -> CutOfTwo:
        for name, number in (("start", cut.start), ("duration", cut.duration)):
            if not math.isfinite(number):
                raise _Unusable(f"the {name} of the cut is {number}: correct the manifest")
        left, right = sorted(cut.channel)
        if self.reading.main_channel == "right":
            left, right = right, left
        moshi, user = (self._channel(cut, channel) for channel in (left, right))
        is_whole = not cut.start and cut.duration == cut.recording.duration
        sides = Sides(
            moshi, user, None, float(cut.start), None if is_whole else float(cut.duration)
        )
        alignments = [list(entry) for entry in _alignments(cut, left)]
        assert isinstance(moshi.file, Path)
        return CutOfTwo(
            moshi.file,
            cut.id,
            origin,
            float(cut.duration),
            self.reading,
            manifest=self.path,
            where=sides,
            words=json.dumps({WORDS: alignments}),
        )

    def _channel(self, cut: "MultiCut", channel: int) -> Channel:
        if cut.recording is None:
            raise _Unusable("the cut has no recording: audio is needed, features are not read")
        if cut.recording.transforms:
            raise _Unusable(
                "the audio of the cut is changed as it is loaded (transforms): write it first, "
                "with CutSet.save_audios"
            )
        for source in cut.recording.sources:
            if channel in source.channels:
                if source.type != "file":
                    raise _Unusable(
                        f"the audio of the cut is of the type {source.type}: write it to files "
                        "first, with CutSet.save_audios"
                    )
                return Channel(self._path(str(source.source)), source.channels.index(channel))
        raise _Unusable(f"the recording of the cut has no channel {channel}: correct the manifest")

    def _path(self, name: str) -> Path:
        """Return where an audio file is: as in lhotse from the current folder, or else from that
        of the manifest."""
        beside = self.path.parent / name
        return beside if not Path(name).exists() and beside.exists() else Path(name)


class _Unusable(Exception):
    """A cut cannot be a dialogue; says what is wrong and what to do."""


def _alignments(cut: "MultiCut", main_channel: int) -> Iterator[tuple[str, list[float], str]]:
    """Yield the words of a cut with their times from its start; where words have no times, what is
    said at once.

    Raises:
        _Unusable: the times of words do not fit what they are words of.
    """
    for supervision in cut.supervisions:
        channels = supervision.channel
        channels = channels if isinstance(channels, list) else [channels]
        speaker = MAIN_SPEAKER if main_channel in channels else OTHER_SPEAKER
        start_sec, end_sec = float(supervision.start), float(supervision.end)
        items = (supervision.alignment or {}).get("word")
        if items is None and supervision.text:
            yield supervision.text, [start_sec, end_sec], speaker
        # Supervisions count from the start of the cut, and words from that of the recording.
        times = [
            (float(item.start) - cut.start, float(item.end) - cut.start) for item in items or ()
        ]
        inside = [start_sec - 0.01 <= start <= end_sec for start, _ in times]
        if times and not any(inside) and times[0][0] < start_sec <= times[0][0] + cut.start:
            raise _Unusable(
                f"the words of the supervision {supervision.id} lie outside it: their times seem "
                "to count from the start of the cut (lhotse counts from that of the recording). "
                "Make the manifest again with lhotse 1.17 or later"
            )
        for item, (start, end) in zip(items or (), times, strict=True):
            # What lies outside the part belongs to other cuts, unless it is nowhere.
            is_elsewhere = not 0 <= start < cut.duration
            if not (is_elsewhere and 0 <= start + cut.start < cut.recording.duration):
                yield item.symbol, [start, end], speaker
