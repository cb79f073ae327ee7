"""Recordings that share files are told apart; one that is listed in two places is one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layout_tools
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_tools import tiny_codec
from layout_tools import loaded
from recordings_tools import call

from finetune.config import DataArgs
from finetune.data import (
    Recording,
    build_train_loader,
    inspect_listing,
    list_entries,
    open_store,
    warn_if_shared,
)

# Fixtures: pytest finds them by their names in this module.
stereo = layout_tools.stereo


def write_cuts(
    path: Path, audio: Path, parts: list[tuple[float, float]], texts: list[str] | None = None
) -> Path:
    """A manifest of lhotse with parts of a stereo file, (start, duration) in seconds each; what is
    said in each."""
    from lhotse import CutSet, Recording, SupervisionSegment
    from lhotse.cut import MultiCut

    recording = Recording.from_file(audio)
    cuts = []
    for index, (start_sec, duration_sec) in enumerate(parts):
        text = texts[index] if texts else "hello"
        said = SupervisionSegment(f"s{index}", recording.id, 0.1, 0.5, channel=0, text=text)
        about: Any = {"channel": [0, 1], "recording": recording, "supervisions": [said]}
        cuts.append(MultiCut(f"cut{index}", start_sec, duration_sec, **about))
    CutSet.from_cuts(cuts).to_file(path)
    return path


def test_parts_of_one_start_and_two_lengths_keep_codes_of_their_own(
    stereo: Path, tmp_path: Path
) -> None:
    cuts = write_cuts(tmp_path / "cuts.jsonl", stereo.parent / "0.wav", [(0.0, 1.2), (0.0, 2.0)])
    args = DataArgs(train_data=str(cuts), num_workers=0, cache_dir=str(tmp_path / "cache"))
    options: dict[str, Any] = {"duration_sec": 2.0, "batch_size": 1, "seed": 0, "device": "cpu"}
    loader = build_train_loader(args, tiny_codec(), store=open_store(args), **options)
    kept = torch.cat([next(loader).codes for _ in range(2)])
    loader.close()
    assert torch.equal(kept, loaded(cuts)) and not torch.equal(kept[0], kept[1])


def test_what_is_wrong_with_one_of_two_that_share_files_is_found(
    stereo: Path, tmp_path: Path, capsys: Any
) -> None:
    """The same audio with other words, and rows of one name: each is looked at by itself."""
    part = (0.0, 1.2)
    texts = ["hello", "What was said by both of them goes on and on"]
    cuts = write_cuts(tmp_path / "cuts.jsonl", stereo.parent / "0.wav", [part] * 2, texts)
    rows = np.ones((2, 17, 25), np.int64)
    rows[1] = -5
    table = {"id": ["one name"] * 2, "codes": rows.tolist()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "codes.parquet")
    for path, code in [(cuts, "sentences-as-words"), (tmp_path / "codes.parquet", "unreadable")]:
        for _ in range(2):  # the second time by what was kept
            out = tmp_path / "found.json"
            call("data", "check", path, "--json", out, "--workers=1", "--fast")
            found = json.loads(out.read_text())["recordings"]
            first, second = ({each["code"] for each in one["findings"]} for one in found)
            assert code in second and code not in first, found


def recordings_of(path: Path) -> list[Recording]:
    found = [entry.recording for entry in list_entries(path, "data")]
    return [recording for recording in found if recording is not None]


def test_the_same_part_in_two_manifests_is_trained_on_and_evaluated(
    stereo: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(stereo.parent)
    audio = stereo.parent / "1.wav"
    trained = write_cuts(tmp_path / "cuts_train.jsonl", audio, [(0.3, 0.2), (0.0, 1.2)])
    all_of_it = write_cuts(tmp_path / "cuts_all.jsonl", audio, [(0.0, 2.4)])

    def said(path: Path, trained: Path = trained) -> str:
        found = inspect_listing(recordings_of(trained), recordings_of(path))
        return " ".join(each.message for each in found if each.code == "evaluation-in-training")

    linked = tmp_path / "link/1.wav"
    same = write_cuts(tmp_path / "cuts_eval.jsonl", linked, [(1.2, 1.0), (0.0, 1.2)])
    assert "1 of 2 recordings" in said(same) and f"{same}/cut1, by {same}:2" in said(same)
    over = write_cuts(tmp_path / "cuts_over.jsonl", audio, [(0.2, 0.1), (1.0, 0.8), (1.3, 0.5)])
    assert "2 of 3 recordings" in said(over), "parts that overlap"
    other = write_cuts(tmp_path / "cuts_other.jsonl", audio, [(1.2, 0.3), (1.5, 0.9)])
    assert not said(other), "other parts of the same file"
    assert "1 of 3 recordings" in said(stereo, all_of_it), "a cut of a whole file is that file"
    pairs = layout_tools.mono_pairs(tmp_path, stereo)
    by_link = pairs.with_name("by link.jsonl")
    (tmp_path / "here").symlink_to(tmp_path)
    by_link.write_text(pairs.read_text().replace('_path": "', '_path": "here/'))
    found = inspect_listing(recordings_of(pairs), recordings_of(by_link))
    assert "3 of 3 recordings" in found[0].message, "two files of which one is named by a link"


def test_a_recording_of_two_lists_is_named_at_the_start(
    stereo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = json.loads(stereo.read_text().splitlines()[0])
    again = tmp_path / "again.jsonl"
    again.write_text(json.dumps(first | {"path": str(stereo.parent / first["path"])}))
    args = DataArgs(train_data=f"{stereo},{again}:0.5", num_workers=0)
    options: dict[str, Any] = {"duration_sec": 1.0, "batch_size": 1, "seed": 0, "device": "cpu"}
    build_train_loader(args, tiny_codec(), store=None, **options)
    (said,) = [each for each in caplog.messages if "[listed-twice]" in each]
    assert said.startswith("data.train_data: 1 recording is listed more than once")
    assert f"{first['path']} 2 times" in said


def test_one_key_stands_before_the_message(stereo: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained: Any = SimpleNamespace(recordings=recordings_of(stereo))
    warn_if_shared(trained, trained)
    assert re.match(r"data\.eval_data: 3 of 3 recordings of ", caplog.messages[-1])


def test_rows_of_one_id_are_not_one_recording(tmp_path: Path) -> None:
    table = {"id": ["one name"] * 2, "codes": np.ones((2, 17, 25), np.int64).tolist()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "codes.parquet")
    assert not inspect_listing(recordings_of(tmp_path / "codes.parquet"))
