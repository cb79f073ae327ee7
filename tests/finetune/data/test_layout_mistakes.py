"""What is wrong with data in one of the layouts, or with what reads it, is named."""

import gzip
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layout_tools
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from layout_tools import (
    lhotse_cuts,
    lhotse_parts,
    loaded,
    mono_pairs,
    parquet_codes,
    parquet_without_text,
    save_columns,
    saved_dataset,
    words_of,
)
from recordings_tools import call

from finetune.data.layouts import list_entries
from finetune.data.layouts.saved_dataset import _open_arrow
from finetune.data.problems import FileProblem
from finetune.errors import UserError

# Fixtures: pytest finds them by their names in this module.
stereo = layout_tools.stereo


PACKAGES = [
    (parquet_codes, "pyarrow", "parquet"),
    (saved_dataset, "pyarrow", "datasets"),
    (lhotse_cuts, "lhotse", "lhotse"),
]


@pytest.mark.parametrize(("write", "package", "extra"), PACKAGES)
def test_a_package_that_is_missing_is_one_message(
    tmp_path: Path,
    stereo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Any,
    package: str,
    extra: str,
) -> None:
    path = write(tmp_path, stereo)
    monkeypatch.setitem(sys.modules, package, None)
    assert call("data", "check", path) == 1
    said = capsys.readouterr().err.split("error: ")
    assert said[1:] == [
        f"{path} needs {package}, which is not installed. Install it with: pip install "
        f"'moshi-ttt[{extra}]'\n"
    ]


def changed_cuts(change: Callable[[Any], Any]) -> Callable[[Path, Path], Path]:
    """Cuts whose first line is another one."""

    def write(folder: Path, stereo: Path) -> Path:
        lines = gzip.decompress(lhotse_parts(folder, stereo).read_bytes()).decode().splitlines()
        first = json.loads(lines[0])
        change(first)
        path = folder / "cuts.jsonl"
        path.write_text("\n".join([json.dumps(first), *lines[1:]]))
        return path

    return write


def from_the_start_of_the_cut(cut: Any) -> None:
    cut["start"] = 1.0
    for each in cut["supervisions"]:
        each["start"] = 0.55
        each["alignment"]["word"] = [["late", 0.6, 0.1, None]]


def pair_of(**lines: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        path = mono_pairs(folder, stereo)
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | lines), *rest]))
        return path

    return write


def mixed_transcript(folder: Path, stereo: Path) -> Path:
    path = mono_pairs(folder, stereo)
    (folder / "0_moshi.json").write_text(json.dumps({"alignments": words_of(0)}))
    return path


def longer_user(folder: Path, stereo: Path) -> Path:
    path = mono_pairs(folder, stereo)
    soundfile.write(folder / "0_user.wav", np.zeros(60_000), 24000)
    return path


def table_of(**columns: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return write


def data_set_of(audio: list[str], **columns: Any) -> Callable[[Path, Path], Path]:
    def write(folder: Path, stereo: Path) -> Path:
        wav = str(stereo.parent / "0.wav")
        return save_columns(folder, {name: [wav] for name in audio} | columns, audio)

    return write


def several_data_sets(folder: Path, stereo: Path) -> Path:
    import datasets

    data = datasets.Dataset.from_dict({"a": [1]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder / "saved")
    return folder / "saved"


def damaged(write: Callable[[Path, Path], Path], pattern: str = "") -> Callable[[Path, Path], Path]:
    def write_and_damage(folder: Path, stereo: Path) -> Path:
        path = write(folder, stereo)
        file = next(path.glob(pattern)) if pattern else path
        file.write_bytes(file.read_bytes()[:300])
        return path

    return write_and_damage


def sound_of(write: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """Data of recordings of which one is cut off."""

    def write_with_damage(folder: Path, stereo: Path) -> Path:
        own = shutil.copytree(stereo.parent, folder / "own") / stereo.name
        file = own.parent / "0.wav"
        if write is saved_dataset:  # which holds the audio itself
            file.write_bytes(file.read_bytes()[:3000])
        path = write(folder, own)
        if write is not saved_dataset:
            file = folder / "0_moshi.wav" if write is mono_pairs else file
            file.write_bytes(file.read_bytes()[:3000])
        return path

    return write_with_damage


JSON_WORDS = json.dumps(words_of(0))
MISTAKES: dict[str, Callable[[Path, Path], Path]] = {
    "it is a MonoCut, and a dialogue is a MultiCut of two channels": changed_cuts(
        lambda cut: cut.update(type="MonoCut", channel=0)
    ),
    "malformed line, not a cut of lhotse": changed_cuts(lambda cut: cut.pop("id")),
    "the audio of the cut is of the type command: write it to files": changed_cuts(
        lambda cut: cut["recording"]["sources"][0].update(type="command", source="touch /tmp/x")
    ),
    "the audio of the cut is changed as it is loaded": changed_cuts(
        lambda cut: cut["recording"].update(
            transforms=[{"name": "Volume", "kwargs": {"factor": 2}}]
        )
    ),
    "their times seem to count from the start of the cut": changed_cuts(from_the_start_of_the_cut),
    "it is listed with 2.0 s, but": changed_cuts(
        lambda cut: cut.update(start=2.5, supervisions=[])
    ),
    "the start of the cut is nan": changed_cuts(lambda cut: cut.update(start=math.nan)),
    "the duration of the cut is inf": changed_cuts(lambda cut: cut.update(duration=math.inf)),
    "nothing is left of the part that starts at 9 s": changed_cuts(
        lambda cut: cut.update(start=9.0, supervisions=[])
    ),
    "0_no.wav is missing": pair_of(user_path="0_no.wav"),
    "leads out of the folder of pairs.jsonl": pair_of(user_path="../stereo.wav"),
    "both channels of": pair_of(user_path="0_moshi.wav"),
    "both files of the dialogue have a transcript": mixed_transcript,
    "so that they may not start together": longer_user,
    "has no column codes": table_of(tokens=[[1, 2]]),
    "codes have shape [2] of int64": table_of(codes=[[1, 2]]),
    "codes have shape [2] of int64: expected": table_of(codes=[[[1, 2], [1]]]),
    "of double: expected whole numbers": table_of(codes=[[[0.5]] * 17]),
    "there is no column alignments": table_of(codes=[[[1] * 25] * 16]),
    "without start, end, speaker": table_of(codes=[[[1] * 25] * 16], alignments=[[{"word": "a"}]]),
    "cannot be read as Parquet": damaged(parquet_codes),
    "has 2 columns of audio (a, b): there must be one": data_set_of(
        ["a", "b"], alignments=[JSON_WORDS]
    ),
    "has no column alignments with the words": data_set_of(["audio"]),
    "is not valid JSON": data_set_of(["audio"], alignments=["["]),
    "is malformed: alignments[0] is 1": data_set_of(["audio"], alignments=[[1, 2]]),
    "is no list of words": data_set_of(["audio"], alignments=[7]),
    "is empty": data_set_of(["audio"], alignments=[None]),
    "it is listed with 5.0 s": data_set_of(["audio"], alignments=[JSON_WORDS], duration=[5.0]),
    "holds several data sets: test, train. Name one": several_data_sets,
    "copy or convert it again, or remove its row": sound_of(saved_dataset),
    "copy or convert it again, or remove its cut": sound_of(lhotse_cuts),
    "copy or convert it again, or remove its line": sound_of(mono_pairs),
    "cannot be read as Arrow": damaged(saved_dataset, "*.arrow"),
}


def replaced(write: Callable[[Path, Path], Path], old: bytes, new: bytes) -> Any:
    """Data with other bytes at a place, as a bad disk leaves them."""

    def write_and_replace(folder: Path, stereo: Path) -> Path:
        path = write(folder, stereo)
        for file in path.glob("*.arrow") if path.is_dir() else [path]:
            file.write_bytes(file.read_bytes().replace(old, new))
        return path

    return write_and_replace


def with_wrong_end(folder: Path, stereo: Path) -> Path:
    """Text that would go on beyond the file: pyarrow ends the process on it, if it is not asked."""
    path = saved_dataset(folder, stereo)
    file = min(path.glob("*.arrow"))
    end = len(json.dumps({"alignments": words_of(0)}))
    old = b"".join(each.to_bytes(4, "little") for each in (0, end))
    assert old in file.read_bytes()
    replaced_end = old[:4] + (2**31 - 8).to_bytes(4, "little")
    file.write_bytes(file.read_bytes().replace(old, replaced_end))
    return path


DAMAGES = {
    "text in Parquet": replaced(parquet_without_text, b"SPEAKER_MAIN", b"SPEAKER\xffMAIN"),
    "a name in Parquet": replaced(parquet_codes, b"codes", b"code\xff"),
    "text in Arrow": replaced(saved_dataset, b"SPEAKER_MAIN", b"SPEAKER\xffMAIN"),
    "where text in Arrow ends": with_wrong_end,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_named(tmp_path: Path, stereo: Path, damage: str) -> None:
    path = DAMAGES[damage](tmp_path, stereo)
    with pytest.raises(UserError, match="cannot be read") as error:
        loaded(path)
    assert str(path) in str(error.value)


def test_a_table_is_looked_through_once_a_version(
    tmp_path: Path, stereo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened for nearly every segment where more of them are used than stay open."""
    looked_through: list[bool] = []
    open_stream = pyarrow.ipc.open_stream

    class Told:
        """A table, and what reads it, that tells when it is looked through."""

        def __init__(self, source: Any) -> None:
            self.table = open_stream(source).read_all()

        def read_all(self) -> "Told":
            return self

        def validate(self, *, full: bool) -> None:
            looked_through.append(full)
            self.table.validate(full=full)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.table, name)

    monkeypatch.setattr(pyarrow.ipc, "open_stream", Told)
    path = saved_dataset(tmp_path, stereo)
    entries = list_entries(path, "data.train_data")
    for entry in entries:
        _open_arrow.cache_clear()  # as others that are opened do
        assert entry.recording is not None and entry.recording.read_words()
    assert looked_through == [True, True], "one for each file"
    # What is damaged meanwhile is another version.
    first = entries[0].recording
    assert first is not None
    with_wrong_end(tmp_path / "damaged", stereo)
    damaged_file = min((tmp_path / "damaged/saved").glob("*.arrow"))
    shutil.copyfile(damaged_file, path / damaged_file.name)
    with pytest.raises(FileProblem, match="cannot be read"):
        first.read_words()


@pytest.mark.parametrize("message", MISTAKES)
def test_what_is_wrong_is_named(tmp_path: Path, stereo: Path, message: str) -> None:
    path = MISTAKES[message](tmp_path, stereo)
    with pytest.raises(UserError) as error:
        loaded(path)
    assert message in str(error.value), error.value
    assert str(tmp_path) in str(error.value)


def test_a_large_row_group_is_a_warning(
    tmp_path: Path,
    stereo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = parquet_codes(tmp_path, stereo)
    loaded(path)
    assert "row group" not in caplog.text
    monkeypatch.setattr("finetune.data.layouts.parquet._MAX_GROUP_BYTES", 100)
    loaded(path)
    assert caplog.text.count("write smaller ones, with row_group_size=64") == 1


def test_a_stereo_file_as_one_of_two(tmp_path: Path, stereo: Path) -> None:
    path = pair_of(user_path=str(stereo.parent / "0.wav"))(tmp_path, stereo)
    with pytest.raises(UserError, match="is made of 2 channels, not mono: name files that hold"):
        loaded(path)
