"""Codes instead of audio: Parquet files with a dialogue in each row."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.config import require_sources
from finetune.data.audio_files import version_of
from finetune.data.layouts.base import Entry, Source
from finetune.data.layouts.codes import CodesRecording, shape_problem
from finetune.data.layouts.tables import (
    NAME,
    WORDS,
    damage_of,
    names_of,
    require_package,
    transcript_in,
)
from finetune.data.problems import FileProblem
from finetune.data.text import FRAME_RATE_HZ
from finetune.data.transcripts import Word
from finetune.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

logger = logging.getLogger(__name__)

_CODES = "codes"
_MAX_GROUP_BYTES = 2**29


@dataclass(frozen=True)
class CodesRow(CodesRecording):
    """A row of a Parquet file; the words are in its column `alignments`.

    Args:
        group: the row group.
        row: in that group.
    """

    group: int = field(kw_only=True)
    row: int = field(kw_only=True)

    # Nothing keeps two rows from having the same `id`.
    @property
    def location(self) -> str:
        return self.origin

    def moved(self, places: Mapping[Path, Path]) -> "CodesRow":
        path = places.get(self.path, self.path)
        return replace(self, path=path, origin=f"{path}{self.origin.removeprefix(str(self.path))}")

    def audio_version(self) -> tuple[object, ...] | None:
        version = super().audio_version()
        return None if version is None else (*version, self.group, self.row)

    def read_words(self) -> list[Word]:
        if self.has_text:
            return []
        with self._readable():
            cell = self._column(WORDS)[self.row].as_py()
        return transcript_in(cell, f"the column {WORDS} of {self.origin}").words

    def load_array(self, start_frame: int, num_frames: int) -> np.ndarray:
        with self._readable():
            streams = self._column(_CODES)[self.row].values
            array = streams.flatten().to_numpy(zero_copy_only=False).reshape(len(streams), -1)
        return array[:, start_frame : start_frame + num_frames]

    def _readable(self) -> AbstractContextManager[None]:
        return damage_of(f"codes {self.title} cannot be read", "copy or make them again")

    def _column(self, name: str) -> Any:
        return _column(self.path, version_of(self.path), self.group, name)


class ParquetSource(Source):
    """A `.parquet` with a dialogue in each row, `[streams, frames]`, or a folder of such files."""

    @classmethod
    def reads(cls, path: Path) -> bool:
        if path.is_dir():
            return any(path.rglob("*.parquet")) and not any(path.rglob("*.jsonl"))
        return path.suffix == ".parquet"

    def entries(self) -> list[Entry]:
        require_sources([self.path], self.key)
        require_package("pyarrow", self.path, "parquet")
        files = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
        return [entry for file in files for entry in self._of_file(file)]

    def _of_file(self, path: Path) -> Iterator[Entry]:
        from pyarrow.parquet import ParquetFile

        try:
            with (
                damage_of(f"{path} cannot be read as Parquet", "make it again"),
                ParquetFile(path) as file,
            ):
                columns = file.schema_arrow.names
                if _CODES in columns:
                    self._warn_of_large_groups(path, file)
                    yield from self._rows(path, file, columns)
                    return
        except FileProblem as problem:
            yield Entry(str(path), None, str(problem))
            return
        raise UserError(
            f"{self.key}: {path} has no column {_CODES}, which is to hold whole numbers [streams, "
            f"frames] in each row; its columns are {', '.join(columns)}."
        )

    def _rows(self, path: Path, file: "ParquetFile", columns: list[str]) -> Iterator[Entry]:
        row = 0
        for group in range(file.num_row_groups):
            wanted = [each for each in columns if each in (_CODES, NAME)]
            table = file.read_row_group(group, columns=wanted)
            names = names_of(table) if NAME in columns else None
            for index, shape in enumerate(_shapes(table.column(_CODES))):
                name = names[index] if names else str(row)
                yield self._entry(path, row, name, shape, group, index, WORDS in columns)
                row += 1

    def _warn_of_large_groups(self, path: Path, file: "ParquetFile") -> None:
        """Warn if much has to be read for a row, and kept in memory for the next ones."""
        groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _MAX_GROUP_BYTES:
            logger.warning(
                "%s: all of a row group is read for each row in it, and the largest holds %.1f GB; "
                "write smaller ones, with row_group_size=64 for example",
                path,
                largest / 1e9,
            )

    def _entry(
        self,
        path: Path,
        row: int,
        name: str,
        shape: tuple[tuple[int, ...], Any],
        group: int,
        index: int,
        has_words: bool,
    ) -> Entry:
        origin = f"{path}, row {row}"
        sizes, dtype = shape
        problem = shape_problem(sizes, dtype, is_whole=str(dtype).lstrip("u").startswith("int"))
        has_text = len(sizes) == 2 and sizes[0] % 2 == 1
        if problem is None and not has_text and not has_words:
            problem = (
                f"the codes are without text, and there is no column {WORDS}: write the text "
                "stream as the first row of the codes, or such a column"
            )
        if problem is not None:
            return Entry(origin, None, problem)
        recording = CodesRow(
            path,
            f"{path.name}/{name}",
            origin,
            sizes[1] / FRAME_RATE_HZ,
            name,
            has_text,
            self.reading.main_channel == "right",
            group=group,
            row=index,
        )
        return Entry(origin, recording)


@lru_cache(maxsize=2)
def _column(path: Path, version: object, group: int, name: str) -> Any:
    """Read a column of a row group; the last ones are kept, for their other rows."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[name]).column(name).combine_chunks()


def _shapes(column: "pyarrow.ChunkedArray") -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the shape of each row, and the type of its numbers. Ragged rows, and those with
    missing numbers, have the shape of a list."""
    from pyarrow import types

    kind = column.type
    depth = 0
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    for cell in column:
        if depth != 2 or not cell.is_valid:
            yield ((len(cell),) if depth and cell.is_valid else ()), kind
            continue
        streams = cell.values
        lengths = {len(stream) for stream in streams if stream.is_valid}
        whole = len(lengths) == 1 and not streams.null_count and not streams.flatten().null_count
        yield ((len(streams), lengths.pop()) if whole else (len(streams),)), kind
