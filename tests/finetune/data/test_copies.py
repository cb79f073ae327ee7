"""A copy of a training recording under another name is a training recording."""

import json
import shutil
from pathlib import Path
from typing import Any

import layout_tools
import pytest
from data_tools import write_dataset
from layout_tools import mono_pairs, parquet_codes, saved_dataset
from recordings_tools import call
from test_which_recording import recordings_of, write_cuts
from training_tools import train

from finetune.data import in_training
from finetune.data.inspection import copies as copies_module
from finetune.data.inspection.copies import copies

# Fixtures: pytest finds them by their names in this module.
stereo = layout_tools.stereo


def renamed(folder: Path, to: Path) -> Path:
    """The list of a copy of a folder, in which each audio file has another name."""
    shutil.copytree(folder, to)
    listing = to / "all.jsonl"
    lines = [json.loads(line) for line in listing.read_text().splitlines()]
    for line in lines:
        for key in line.keys() & {"path", "user_path"}:
            path = to / line[key]
            for suffix in (path.suffix, ".json"):
                if path.with_suffix(suffix).is_file():
                    path.with_suffix(suffix).rename(path.with_name(f"new{path.stem}{suffix}"))
            line[key] = str(Path(line[key]).with_name(f"new{path.name}"))
    listing.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return listing


def num_trained(trained: Path, evaluated: Path) -> int:
    return len(in_training(recordings_of(trained), recordings_of(evaluated)))


def test_files_of_the_same_bytes_are_the_same_in_every_layout(stereo: Path, tmp_path: Path) -> None:
    assert num_trained(stereo, renamed(stereo.parent, tmp_path / "stereo")) == 3
    (tmp_path / "pairs").mkdir()
    pairs = mono_pairs(tmp_path / "pairs", stereo)
    pairs = pairs.rename(pairs.with_name("all.jsonl"))
    copied = renamed(pairs.parent, tmp_path / "copied pairs")
    assert num_trained(pairs, copied) == 3
    for make in (parquet_codes, saved_dataset):
        folder = tmp_path / make.__name__
        folder.mkdir()
        made = make(folder, stereo)
        other = tmp_path / f"other {made.name}"
        (shutil.copytree if made.is_dir() else shutil.copyfile)(made, other)
        assert num_trained(made, other) == 3, make


def test_of_a_copied_file_the_parts_that_were_trained_on_count(
    stereo: Path, tmp_path: Path
) -> None:
    audio = stereo.parent / "1.wav"
    copied = Path(shutil.copyfile(audio, tmp_path / "copy.wav"))
    trained = write_cuts(tmp_path / "cuts_train.jsonl", audio, [(0.0, 1.2)])
    parts = [(1.0, 0.8), (1.2, 0.5), (1.7, 0.5)]
    evaluated = write_cuts(tmp_path / "cuts_eval.jsonl", copied, parts)
    found = in_training(recordings_of(trained), recordings_of(evaluated))
    assert [each.part[1] for each in found] == [1.0]


def test_little_is_read_of_files_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of one size, as recordings that were cut to one length are."""
    content = bytearray(10**6)
    for number in range(20):
        content[500_000] = number
        content[-1] = number
        (tmp_path / f"{number}.wav").write_bytes(content)
    read: list[str] = []
    known = copies_module._all

    def noted(file: Path) -> bytes:
        read.append(file.name)
        return known(file)

    monkeypatch.setattr(copies_module, "_all", noted)
    files = sorted(tmp_path.iterdir())
    assert copies(files[:10], files[10:]) == {} and not read
    copied = Path(shutil.copyfile(files[12], tmp_path / "copy.wav"))
    assert copies([*files[:10], copied], files[10:]) == {copied: files[12]}
    assert sorted(read) == sorted([files[12].name, "copy.wav"])


def test_what_differs_between_the_pieces_is_no_copy(tmp_path: Path) -> None:
    for name, place in (("a", 0), ("b", 10_000), ("empty", None), ("also empty", None)):
        content = bytearray(10**6 if place is not None else 0)
        if place:
            content[place] = 1
        (tmp_path / name).write_bytes(content)
    a, b, empty, other = (tmp_path / name for name in ("a", "b", "empty", "also empty"))
    assert copies_module._some(a) == copies_module._some(b)
    assert copies([a, empty, tmp_path / "gone"], [b, other, tmp_path / "gone too"]) == {}
    (tmp_path / "link").symlink_to(a)
    assert copies([tmp_path / "link"], [a]) == {}, "another name of the file itself"
    (tmp_path / "small").write_bytes(b"12")
    (tmp_path / "small too").write_bytes(b"12")
    small = tmp_path / "small", tmp_path / "small too"
    assert copies(small[:1], small[1:]) == {small[0]: small[1]}


def test_training_and_the_fast_check_say_so(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = write_dataset(tmp_path / "train", [2.0, 1.5, 2.0])
    evaluated = renamed(trained.parent, tmp_path / "eval")
    evaluated.write_text("".join(evaluated.read_text().splitlines(keepends=True)[:2]))
    overrides: dict[str, Any] = {"data.train_data": str(trained), "data.eval_data": str(evaluated)}
    overrides |= {"max_steps": 1, "do_eval": True, "do_ckpt": False}
    said = "2 of 2 recordings of data.eval_data are in data.train_data as well"
    train(config, tmp_path / "run", overrides)
    told = capsys.readouterr().out
    assert said in told and f"as a copy ({tmp_path}/eval/new0.wav" in told
    out = tmp_path / "found.json"
    keys = [f"--{key}={value}" for key, value in overrides.items()]
    call("data", "check", config, "--json", out, "--workers=1", "--fast", *keys)
    together = json.loads(out.read_text())["together"]
    assert any(each["code"] == "evaluation-in-training" for each in together)
