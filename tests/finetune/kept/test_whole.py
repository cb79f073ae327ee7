"""Files, WAVs, pictures and folders are there as a whole, or not at all, with the reason."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from full_disk import FULL, room_for
from matplotlib.figure import Figure

from finetune.config import DataArgs, TrainArgs, save_config
from finetune.errors import UserError
from finetune.kept import (
    WavWriter,
    is_free_folder,
    require_room,
    require_writable,
    whole_folder,
    write_wav,
    write_whole,
)
from finetune.recall.report import write_csv as write_recall
from finetune.report import save_png, write_csv

SAMPLES = np.random.default_rng(0).uniform(-1.2, 1.2, (24000, 2)).astype(np.float32)
LONG = "x" * 50_000
RESULT: dict[str, Any] = {"arm": LONG, "seed": 0, "longer": {}}
SUMMARY = {"count": 1, "accuracy": None, "loss": None}
RESULT["trained_length"] = {"by_distance": {}} | dict.fromkeys(
    ["all", "in one chunk", "straddling"], SUMMARY
)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, LONG),
        lambda path: write_wav(path, SAMPLES, 24000),
        lambda path: write_csv(path, ["a"], [[LONG]]),
        lambda path: write_recall([RESULT], path),
        lambda path: save_config(TrainArgs(DataArgs(train_data=LONG), "run"), path),
        lambda path: save_png(Figure(figsize=(30, 30), facecolor="red"), path),
    ],
    ids=["text", "wav", "table", "recall", "configuration", "picture"],
)
def test_a_full_disk_leaves_the_file_of_before(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    place = tmp_path / "new/result"
    with room_for(2000), pytest.raises(UserError) as failing:
        write(place)
    assert str(failing.value) == f"{place} cannot be written: {FULL}."
    assert list(place.parent.iterdir()) == []
    write(place)
    before = place.read_bytes()
    assert len(before) > 2000
    with room_for(2000), pytest.raises(UserError, match=FULL):
        write(place)
    assert place.read_bytes() == before and list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_in_pieces_is_what_soundfile_writes_at_once(tmp_path: Path, subtype: str) -> None:
    ours, theirs = tmp_path / "ours.wav", tmp_path / "theirs.wav"
    soundfile.write(theirs, SAMPLES, 24000, subtype=subtype)
    file = WavWriter(ours, 24000, 2, subtype=subtype)
    for start in range(0, len(SAMPLES), 1921):
        file.write(SAMPLES[start : start + 1921])
    assert not ours.exists()
    file.keep()
    file.discard()
    ours_read, theirs_read = (soundfile.read(path, dtype="float32") for path in (ours, theirs))
    np.testing.assert_array_equal(ours_read[0], theirs_read[0])
    assert ours_read[1] == 24000 and soundfile.info(ours).subtype == subtype
    assert ours.stat().st_size == theirs.stat().st_size


def test_a_wav_that_is_thrown_away_leaves_nothing(tmp_path: Path) -> None:
    file = WavWriter(tmp_path / "a.wav", 24000, 1)
    file.write(SAMPLES[:, 0])
    file.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/a\.wav cannot be written: (Not a dir|File exists)"):
        WavWriter(tmp_path / "file/a.wav", 24000, 1)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_when_all_of_it_is_there(tmp_path: Path, is_there: bool) -> None:
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
        (out / ".partial").mkdir()  # somebody was killed
        assert is_free_folder(out)
        number = out.stat().st_ino
    with room_for(2000), pytest.raises(UserError) as failing, whole_folder(out) as partial:
        (partial / "small").write_text("it has room")
        (partial / "large").write_text(LONG)
    assert str(failing.value) == f"{out} cannot be written: {FULL}."
    assert [*tmp_path.rglob("*")] == [out][:is_there]
    with whole_folder(out) as partial:
        (partial / "large").write_text(LONG)
        assert not (out / "large").exists()
    assert [*tmp_path.rglob("*")] == [out, out / "large"] and not is_free_folder(out)
    assert not is_there or out.stat().st_ino == number  # a mount stays one


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in ("new.json", "file", "new/folder/deeper", "."):
        require_writable(tmp_path / path, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left there"
    for wrong in (tmp_path / "file/x", tmp_path / "file/x/y", Path("/proc/x/y")):
        with pytest.raises(UserError, match=f"--out: cannot write to {wrong}: "):
            require_writable(wrong, "--out")
    # A full disk may have room for an empty file.
    with room_for(0), pytest.raises(UserError, match=f"--out: cannot write to .*: {FULL}"):
        require_writable(tmp_path / "new/folder", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_finds_no_room_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=2_500_000_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_room(tmp_path / "new/folder", 2.5e9)
    with pytest.raises(UserError) as caught:
        require_room(tmp_path / "new/folder", 2.51e9)
    said = f"{tmp_path / 'new/folder'} takes 2.51 GB, and 2.50 GB are free on its disk: free some"
    assert str(caught.value).startswith(said)
    assert asked == [tmp_path, tmp_path] and not (tmp_path / "new").exists()
