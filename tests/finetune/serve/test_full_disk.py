"""Where there is no room for what Moshi says, or for an export."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from data_tools import speech_like
from full_disk import FULL, room_for
from recordings_tools import call
from training_tools import checkpoint, train

from finetune.errors import UserError
from finetune.serve import ExportOptions, export, export_checkpoint


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("full") / "run"
    train(config, run_dir, {"max_steps": 1, "param_dtype": "float32", "full_finetuning": True})
    return checkpoint(run_dir, 1)


def record(path: Path, num_frames: int) -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, speech_like(num_frames * 0.08, 24000, channels=1), 24000)


def answer(trained: Path, audio: Path, out: Path, *words: str) -> Any:
    return call("generate", f"--checkpoint={trained}", f"--audio={audio}", f"--out={out}", *words)


@pytest.mark.parametrize("stereo", [(), ("--stereo",)], ids=["mono", "stereo"])
def test_one_answer_without_room_keeps_its_words_and_stops_no_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stereo: tuple[str, ...]
) -> None:
    for name, num_frames in (("a_short", 3), ("b_long", 60), ("c_short", 4)):
        record(tmp_path / f"in/{name}.wav", num_frames)
    out = tmp_path / "out"
    words = ("--device=cpu", "--batch_size=2", "--temperature=0", "--text_temperature=0", *stereo)
    with room_for(60_000):
        assert answer(trained, tmp_path / "in", out, *words) == 1
    said = capsys.readouterr().err
    reason = f"{out}/b_long.wav cannot be written: {FULL}. The words are in {out}/b_long.json."
    assert f"1 recording was not answered:\n  - {reason}" in said and "Traceback" not in said
    assert sorted(path.name for path in out.iterdir()) == [
        "a_short.json", "a_short.wav", "b_long.json", "c_short.json", "c_short.wav"
    ]  # fmt: skip
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "alignments" in json.loads(kept["b_long.json"])
    # With room, the words are the same, and the sound is whole; of the others nothing is done.
    written_at = (out / "a_short.wav").stat().st_mtime_ns
    for num_answered in (2, 3):
        assert answer(trained, tmp_path / "in", out, *words, "--missing") == 0
        said = capsys.readouterr().out
        have = "has" if num_answered == 1 else "have"
        assert f"{num_answered} of 3 recordings {have} an answer already" in said
        assert ("wrote" in said) == (num_answered == 2)
    assert (out / "a_short.wav").stat().st_mtime_ns == written_at
    assert kept.items() <= {path.name: path.read_bytes() for path in out.iterdir()}.items()
    assert soundfile.info(out / "b_long.wav").frames == 60 * 1920


def test_an_answer_that_cannot_be_begun_is_named_with_the_reason(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "in/a.wav", 3)
    (tmp_path / f".a.wav.{os.getpid()}.part").mkdir()
    assert answer(trained, tmp_path / "in/a.wav", tmp_path / "a.wav", "--device=cpu") == 1
    said = capsys.readouterr().err
    assert f"  - {tmp_path}/a.wav cannot be written: Is a directory." in said
    assert not (tmp_path / "a.wav").exists()


def test_an_export_without_room_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    options = ExportOptions(trained, tmp_path / "model", device="cpu")
    with room_for(20_000), pytest.raises(UserError) as failing:
        export_checkpoint(options)
    assert str(failing.value) == f"{tmp_path}/model cannot be written: {FULL}."
    assert list(tmp_path.iterdir()) == []
    assert export_checkpoint(options).difference < 1e-6
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_finds_no_room_is_refused_before_anything_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is known, but for small files."""
    out = tmp_path / "out"
    options = ExportOptions(trained, out, device="cpu")
    export_checkpoint(options)
    size = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.95 * size))
    monkeypatch.setattr(export, "load_for_inference", None)
    with pytest.raises(UserError, match=f"{out} takes .* and .* are free on its disk"):
        export_checkpoint(options)
    assert not out.exists()
