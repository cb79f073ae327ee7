"""A data set of Hugging Face's `datasets` as `save_to_disk` writes it: Arrow files with audio."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.audio_files import AudioFile, Embedded, version_of
from finetune.data.audio_recording import AudioRecording
from finetune.data.layouts.base import Entry, Source
from finetune.data.layouts.tables import (
    WORDS,
    damage_of,
    names_of,
    require_package,
    transcript_in,
)
from finetune.data.problems import FileProblem
from finetune.data.sides import Sides
from finetune.data.transcripts import Transcript
from finetune.errors import UserError
from finetune.safety import read_json, stays_inside

if TYPE_CHECKING:
    import pyarrow

_SIDES = ("moshi", "user")
_DURATION = "duration"


@dataclass(frozen=True)
class SavedRow(AudioRecording):
    """A row of a saved data set.

    Args:
        row: in the Arrow file at `path`.
        columns: one of stereo audio, or two of mono audio, Moshi's first.
        is_promised: the data set says how long it is.
    """

    row: int = field(kw_only=True)
    columns: tuple[str, ...] = field(kw_only=True)
    is_promised: bool = field(kw_only=True)

    leave_out = "remove its row"

    @property
    def location(self) -> str:
        return f"{self.path}, row {self.row}"

    @property
    def promised_sec(self) -> float | None:
        return self.duration_sec if self.is_promised else None

    @property
    def sides(self) -> Sides:
        files = [self._audio(column) for column in self.columns]
        if len(files) == 2:
            return Sides.of_two(*files)
        return Sides.of_stereo(files[0], self.reading.main_channel)

    @property
    def words_version(self) -> tuple[object, ...]:
        return (self.row,)

    def load_transcript(self) -> Transcript:
        with self._readable():
            cell = self._cell(WORDS).as_py()
        return transcript_in(cell, f"the column {WORDS} of {self.location}")

    def _cell(self, column: str) -> Any:
        return _open_arrow(self.path, version_of(self.path)).column(column)[self.row]

    def _readable(self) -> AbstractContextManager[None]:
        return damage_of(f"row {self.row} of {self.path} cannot be read", "save the data set again")

    def _audio(self, column: str) -> AudioFile:
        name = f"{self.location}, column {column}"
        with self._readable():
            cell = self._cell(column)
            # datasets writes audio into the table; older releases left the name of a file alone.
            if not cell.is_valid or (not cell["bytes"].is_valid and not cell["path"].is_valid):
                return Embedded(f"{name} (empty)", self.path, bytes)
            if not cell["bytes"].is_valid:
                return Path(cell["path"].as_py())
        return Embedded(name, self.path, partial(_read_bytes, self, column))


def _read_bytes(recording: SavedRow, column: str) -> bytes:
    with recording._readable():
        content: bytes = recording._cell(column)["bytes"].as_py()
    return content


class SavedDatasetSource(Source):
    """A folder that `Dataset.save_to_disk` of Hugging Face's `datasets` has written."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()

    def entries(self) -> list[Entry]:
        if (self.path / "dataset_dict.json").is_file():
            parts = sorted(each.parent.name for each in self.path.glob("*/dataset_info.json"))
            raise UserError(
                f"{self.key}: {self.path} holds several data sets: {', '.join(parts)}. Name one, "
                f"as {self.path / (parts[0] if parts else 'train')}."
            )
        require_package("pyarrow", self.path, "datasets")
        columns = self._audio_columns()
        return [entry for file in self._files() for entry in self._of_file(file, columns)]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.key}: {self.path / name} cannot be read ({error}). Save the data set again "
                "with save_to_disk."
            ) from None
        return content if isinstance(content, dict) else {}

    def _files(self) -> list[Path]:
        state = self._read("state.json")
        if state.get("_indices_data_files"):
            raise UserError(
                f"{self.key}: {self.path} is a selection of rows of its files. Write these rows "
                "alone: dataset.flatten_indices().save_to_disk(…)"
            )
        listed = state.get("_data_files")
        names = [each.get("filename") for each in listed] if isinstance(listed, list) else []
        if not names or not all(isinstance(each, str) and stays_inside(each) for each in names):
            raise UserError(
                f"{self.key}: {self.path / 'state.json'} names no files of the data set. Save it "
                "again with save_to_disk."
            )
        return [self.path / name for name in names]

    def _audio_columns(self) -> tuple[str, ...]:
        """Return the column with stereo audio, or those of Moshi and the user."""
        features = self._read("dataset_info.json").get("features") or {}
        kinds = {
            name: feature.get("_type")
            for name, feature in features.items()
            if type(feature) is dict
        }
        audio = [name for name, kind in kinds.items() if kind == "Audio"]
        if WORDS not in features:
            raise UserError(
                f"{self.key}: {self.path} has no column {WORDS} with the words of each row; its "
                f"columns are {', '.join(features)}. See docs/data.md, Layouts."
            )
        if set(_SIDES) <= set(audio):
            return _SIDES
        if len(audio) == 1:
            return (audio[0],)
        raise UserError(
            f"{self.key}: {self.path} has {len(audio)} columns of audio ({', '.join(audio)}): "
            f"there must be one, of stereo audio, or {_SIDES[0]} and {_SIDES[1]}, of mono audio. "
            "Columns get other names by dataset.rename_column, and become audio by "
            "dataset.cast_column(NAME, Audio())."
        )

    def _of_file(self, path: Path, columns: tuple[str, ...]) -> Iterator[Entry]:
        try:
            with damage_of(f"{path} cannot be read as Arrow", "save the data set again"):
                table = _open_arrow(path, version_of(path))
                names = names_of(table)
                promised = [None] * table.num_rows
                if _DURATION in table.column_names:
                    promised = table.column(_DURATION).to_pylist()
        except FileProblem as problem:
            yield Entry(str(path), None, str(problem))
            return
        # Columns say who is who; there is no channel to be told apart.
        reading = self.reading if len(columns) == 1 else replace(self.reading, main_channel="left")
        for row, (name, duration_sec) in enumerate(zip(names, promised, strict=True)):
            is_promised = type(duration_sec) in (int, float)
            recording = SavedRow(
                path,
                f"{path.name}/{name}",
                f"{path}, row {row}",
                float(duration_sec or 0.0),
                reading,
                row=row,
                columns=columns,
                is_promised=is_promised,
            )
            yield Entry(recording.origin, recording)


_sound: set[tuple[Path, object]] = set()
"""Files, in their versions, of which this process has read all where values begin and end. Shuffled
segments of more files than stay open open one nearly each time, which need not read it again."""


@lru_cache(maxsize=64)
def _open_arrow(path: Path, version: object) -> "pyarrow.Table":
    """Open an Arrow file; audio in it is read from the disk when it is used."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        table = pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_file(source).read_all()
    if (path, version) not in _sound:
        # Where values begin and end is in the file, and pyarrow believes it: what is damaged there
        # would end the process. This reads all of that, and text, but no audio.
        table.validate(full=True)
        _sound.add((path, version))
    return table
