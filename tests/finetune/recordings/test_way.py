"""From plain recordings with text files to a run, and what is seen of them on the way."""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread
from recordings_tools import DIALOGUES, call, plain_folder, true_words

from finetune.monitoring import metrics_path, read_metrics

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "example/demo.yaml"


def commands_of_the_readme() -> list[Any]:
    """The commands below the heading on plain recordings, as words."""
    text = (ROOT / "README.md").read_text().split("## From plain recordings")[1]
    block = re.search(r"```sh\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.strip()]


def test_from_a_folder_of_plain_recordings_to_a_started_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of the README, typed in a folder with recordings and a configuration."""
    commands = commands_of_the_readme()
    assert len(commands) == 4 and [words[1] for words in commands] == ["data"] * 3 + ["train"]
    plain_folder(tmp_path / "talks")
    shutil.copytree(ROOT / "example", tmp_path / "example")
    monkeypatch.chdir(tmp_path)
    assert not list((tmp_path / "talks").glob("*.json*"))
    small = ["--duration_sec=4", "--ttt.chunk_size=10", "--max_steps=2", "--batch_size=2"]
    small += ["--log_freq=1", "--data.num_workers=0"]
    for words in commands:
        given = [word.replace("moshi_ttt.yaml", "demo.yaml") for word in words[1:]]
        assert call(*given, *(small if words[1] == "train" else [])) == 0, capsys.readouterr().err
    assert "0 with errors, 0 with warnings" in capsys.readouterr().out
    assert read_metrics(metrics_path(tmp_path / "runs/talks", "train"))[-1]["step"] == 2


def test_a_segment_is_drawn_and_cut_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.png"
    words = [
        "data",
        "show",
        DIALOGUES / "train.jsonl",
        "--index=1",
        "--start_sec=1.05",
        "--out",
        out,
    ]
    assert call(*words, "--duration_sec=2", "--config", EXAMPLE) == 0
    assert "left Moshi, right the user" in capsys.readouterr().out
    sound, rate = soundfile.read(tmp_path / "a.wav", dtype="int16")
    whole, whole_rate = soundfile.read(DIALOGUES / "train_001.wav", dtype="int16")
    first = round(1.04 * rate)  # the frame that holds 1.05 s
    assert rate == whole_rate and np.array_equal(sound, whole[first : first + 2 * rate])
    assert imread(out).shape[0] > imread(_draw(tmp_path / "b.png"))[..., 0].shape[0] + 200, (
        "with --config tokens and codes are below the waveforms"
    )


def _draw(out: Path, *words: Any) -> Path:
    assert call("data", "show", DIALOGUES / "train.jsonl", "--out", out, *words) == 0
    return out


def red_share(picture: Path) -> float:
    red, green, blue = np.moveaxis(imread(picture)[..., :3], -1, 0)
    return ((red > 0.7) & (green < 0.25) & (blue > 0.1) & (blue < 0.25)).mean()


@pytest.mark.parametrize("fault", ["swapped", "silent"])
def test_words_without_sound_on_their_side_are_red(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, rate = soundfile.read(DIALOGUES / "train_000.wav")
    samples = samples[:, ::-1] if fault == "swapped" else samples * [0, 1]
    soundfile.write(tmp_path / "a.wav", samples, rate)
    shutil.copy(DIALOGUES / "train_000.json", tmp_path / "a.json")
    (tmp_path / "data.jsonl").write_text('{"path": "a.wav", "duration": 5.0}\n')
    status = call("data", "show", tmp_path / "data.jsonl", "--out", tmp_path / "bad.png")
    assert status == (1 if fault == "silent" else 0), "as of data check, an error or a warning"
    assert fault in capsys.readouterr().out
    # How many pixels of thin letters are wholly red, the version of matplotlib decides.
    assert red_share(_draw(tmp_path / "good.png")) == 0 < red_share(tmp_path / "bad.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--index=7"], "has 2 recordings, numbered from 0"),
        (["--start_sec=5.5"], "lasts 5.00 s"),
        (["--out=a.jpg"], ".png"),
        (["--text_padding_weight=1"], "--config"),
    ],
)
def test_a_mistake_of_show_is_one_message(
    words: list[str], message: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("data", "show", DIALOGUES / "train.jsonl", *words) == 1
    assert message in capsys.readouterr().err


def test_a_transcript_that_cannot_be_read_is_said_by_the_status_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DIALOGUES / "train_000.wav", tmp_path / "a.wav")
    (tmp_path / "a.json").write_text('{"alignments": [')
    (tmp_path / "data.jsonl").write_text('{"path": "a.wav", "duration": 5.0}\n')
    out = tmp_path / "shown.png"
    assert call("data", "show", tmp_path / "data.jsonl", "--out", out) == 1
    said = capsys.readouterr().out
    assert "[transcript-malformed]" in said and f"wrote {out}" in said and out.exists()


def test_a_run_from_another_folder_is_told_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ROOT / "example/demo.yaml"
    words = [DIALOGUES / "train.jsonl", "--config", config, "--out", tmp_path / "a.png"]
    assert call("data", "show", *words) == 0
    said = capsys.readouterr().out
    assert "not shown: moshi_paths.hf_repo_id example/demo/model is no folder" in said
    assert f"a path starts from the current folder, {tmp_path})" in said


def test_what_is_there_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tokenizer", ROOT / "example/demo/model/tokenizer.model", "--workers=1"]
    out = tmp_path / "stats.png"
    assert call("data", "stats", DIALOGUES / "train.jsonl", "--out", out, *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert out.read_bytes().startswith(b"\x89PNG")
    on_sec, num_words = 0.0, 0
    for name in ("train_000", "train_001"):
        spoken = true_words(name, "SPEAKER_MAIN")
        pauses = [b[1] - a[2] for a, b in pairwise(spoken)]
        on_sec += sum(end - start for _, start, end in spoken)
        on_sec += sum(pause for pause in pauses if 0 < pause <= 0.5)
        num_words += len(spoken)
    assert re.search(r"recordings\W+2 ", said)
    assert f"{on_sec / 10:.1%} of the time, {60 * num_words / on_sec:.0f} words a minute" in said
    # "Maria." of train_001 ends 0.098 s after the user's "Hello," has begun.
    assert re.search(r"both speak\W+1\.0% of the time", said)
    assert "text tokens" in said
