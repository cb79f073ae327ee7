"""`moshi-ttt generate`: recordings in, answers out."""

import json
import re
import signal
import struct
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from data_tools import speech_like, tiny_tokenizer
from forked import COMMAND, Program
from moshi.modules.transformer import StreamingMultiheadAttention
from training_tools import checkpoint, train, write_model

from finetune.__main__ import main
from finetune.data import count_frames, decoders
from finetune.serve import continuation, files
from finetune.serve.engine import Engine, Spoken
from finetune.serve.session import identify

ROOT = Path(__file__).parents[3]
GREEDY = ["--temperature=0", "--text_temperature=0", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with TTT, hardly trained."""
    run_dir = tmp_path_factory.mktemp("talk") / "run"
    train(config, run_dir, {"max_steps": 2, "param_dtype": "float32", "full_finetuning": True})
    return checkpoint(run_dir, 2)


def call(*words: Any) -> str | int | None:
    old, sys.argv = sys.argv, ["moshi-ttt", "generate", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as leaving:
            main()
    finally:
        sys.argv = old
    return leaving.value.code


def record(
    path: Path, num_samples: int, *, rate_hz: int = 24000, channels: int = 1, seed: int = 0
) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = speech_like(num_samples / rate_hz, rate_hz, seed=seed, channels=channels)
    how = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, audio, rate_hz, **how)
    return audio


def test_three_at_once_are_three_alone_to_the_sample(trained: Path, tmp_path: Path) -> None:
    record(tmp_path / "in/a.wav", 24001, seed=1)
    record(tmp_path / "in/b.wav", 16000, rate_hz=16000, seed=2, channels=2)
    record(tmp_path / "in/c.wav", 7999, rate_hz=8000, seed=3)
    lengths: dict[str, Any] = {"a": 24001, "b": 24000, "c": 7999 * 3}
    assert (
        call(f"--checkpoint={trained}", f"--audio={tmp_path}/in", f"--out={tmp_path}/all", *GREEDY)
        == 0
    )
    for name, num_samples in lengths.items():
        together, rate_hz = soundfile.read(tmp_path / f"all/{name}.wav")
        assert rate_hz == 24000 and together.shape == (num_samples,)
        one = tmp_path / f"{name}.wav"
        words = [f"--checkpoint={trained}", f"--audio={tmp_path}/in/{name}.wav", f"--out={one}"]
        assert call(*words, *GREEDY) == 0
        alone, _ = soundfile.read(one)
        # Two of the steps of 16 bits.
        np.testing.assert_allclose(together, alone, atol=2.1 / 32768)
        assert np.abs(alone).max() > 1e-3
        said = json.loads((tmp_path / f"all/{name}.json").read_text())
        assert said == json.loads(one.with_suffix(".json").read_text())
        end_sec = count_frames(num_samples / 24000) / 12.5
        times = [time for _, interval, _ in said["alignments"] for time in interval]
        assert times == sorted(times) and all(0 <= time <= end_sec for time in times)


def test_a_tree_of_ten_with_one_broken_is_nine_and_a_list(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(10):
        record(tmp_path / f"tree/TASK{index % 2}/{index}/input.wav", 4000 + index, seed=index)
    broken = tmp_path / "tree/TASK1/5/input.wav"
    broken.write_bytes(b"no wav at all")
    words = [f"--checkpoint={trained}", f"--input_dir={tmp_path}/tree", "--stereo", *GREEDY]
    assert call(*words, "--batch_size=4") == 1
    shown = capsys.readouterr()
    assert "1 recording was not answered:" in shown.err and str(broken) in shown.err
    assert "9 of 10 recordings" in shown.out and "x real time" in shown.out
    written = sorted((tmp_path / "tree").rglob("output.wav"))
    assert len(written) == 9 and not list((tmp_path / "tree").rglob("*.part"))
    for path in written:
        heard, _ = soundfile.read(path.with_name("input.wav"))
        both, _ = soundfile.read(path)
        assert both.shape == (4000 + int(path.parent.name), 2)
        # Left Moshi, right the user.
        np.testing.assert_allclose(both[:, 1], heard, atol=1e-4)
        assert np.abs(both[:, 0] - heard).max() > 1e-3


@pytest.mark.parametrize("suffix", ["mp3", "opus"])
def test_recordings_that_are_read_in_turns_are_decoded_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for name, rate_hz in (("a", 48000), ("b", 24000), ("c", 48000)):
        record(tmp_path / f"in/{name}.{suffix}", 2 * rate_hz, rate_hz=rate_hz)
    decoded: Counter[str] = Counter()
    original = decoders.SequentialDecoder._decode

    def counted(self: Any) -> Any:
        decoded[self.path.name] += 1
        return original(self)

    monkeypatch.setattr(decoders.SequentialDecoder, "_decode", counted)
    monkeypatch.setattr(files, "_BLOCK_FRAMES", 3)
    words = [f"--checkpoint={trained}", f"--audio={tmp_path}/in", f"--out={tmp_path}/out", *GREEDY]
    assert call(*words, "--batch_size=3") == 0
    # Once to find whether it is whole, and once to be heard.
    assert len(decoded) == 3 and max(decoded.values()) <= 2, decoded


def test_which_channel_is_heard(trained: Path, tmp_path: Path) -> None:
    audio = record(tmp_path / "both.wav", 8000, channels=2)
    words = [f"--checkpoint={trained}", f"--audio={tmp_path}/both.wav", "--stereo", *GREEDY]
    for channel, expected in (("left", audio[:, 0]), ("mix", audio.mean(1)), (None, audio[:, 1])):
        out = tmp_path / f"{channel}.wav"
        chosen = [f"--user_channel={channel}"] if channel else []
        assert call(*words, f"--out={out}", *chosen) == 0
        np.testing.assert_allclose(soundfile.read(out)[0][:, 1], expected, atol=1e-4)


@pytest.mark.parametrize("part", ["all", "memory"])
def test_a_session_goes_on_where_it_ended(
    trained: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut in the middle, at the end of a frame, the conversation is the same to the bit."""
    num_samples, cut = 22 * 1920, 12 * 1920
    audio = record(tmp_path / "whole.wav", num_samples, seed=4)
    soundfile.write(tmp_path / "one.wav", audio[:cut], 24000)
    soundfile.write(tmp_path / "two.wav", audio[cut:], 24000)
    words = [f"--checkpoint={trained}", *GREEDY]
    assert call(*words, f"--audio={tmp_path}/whole.wav", f"--out={tmp_path}/w.wav") == 0
    session = tmp_path / "call.session"
    keep = [f"--session={session}", f"--session_part={part}"]
    for name in ("one", "two"):
        sound = [f"--audio={tmp_path}/{name}.wav", f"--out={tmp_path}/{name}_out.wav"]
        assert call(*words, *sound, *keep) == 0
    whole, _ = soundfile.read(tmp_path / "w.wav")
    halves = [soundfile.read(tmp_path / f"{name}_out.wav")[0] for name in ("one", "two")]
    same = np.array_equal(np.concatenate(halves), whole)
    assert same if part == "all" else not same

    # Another checkpoint's is refused by name, and a file that is none, too.
    capsys.readouterr()
    session_before = session.read_bytes()
    sound = [f"--audio={tmp_path}/one.wav", f"--out={tmp_path}/x.wav"]
    words[0] = f"--checkpoint={write_model(tmp_path / 'stock')}"
    assert call(*words, *sound, *keep) == 1
    said = capsys.readouterr().err
    assert "run/checkpoint_000002" in said and "'stock'" in said and said.count("\n") == 2
    assert session.read_bytes() == session_before
    session.write_bytes(session_before[:1000])
    assert call(f"--checkpoint={trained}", *GREEDY, *sound, *keep) == 1
    assert "session" in capsys.readouterr().err


def test_a_conversation_that_becomes_nan_writes_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    record(tmp_path / "in/long.wav", 40 * 1920, channels=2)
    record(tmp_path / "in/short.wav", 3 * 1920, channels=2)
    session = tmp_path / "call.session"
    words = [f"--checkpoint={trained}", *GREEDY[1:]]
    sound = [f"--out={tmp_path}/x.wav", f"--session={session}"]
    assert call(*words, f"--audio={tmp_path}/in/short.wav", *sound) == 0
    kept = session.read_bytes()
    for name in ("x.wav", "x.json"):
        (tmp_path / name).unlink()
    load = files.load_for_inference
    mine = identify(*load(trained, "cpu"), trained)

    def with_huge_targets(*args: Any) -> Any:
        model, codec = load(*args)
        for layer in model.ttt_layers.values():
            layer.target_conv.data.fill_(1e20)
            layer.target_proj.data.mul_(1e20)
        return model, codec

    monkeypatch.setattr(files, "load_for_inference", with_huge_targets)
    monkeypatch.setattr(continuation, "load_for_inference", with_huge_targets)
    # Loading a session of other weights is refused otherwise.
    monkeypatch.setattr(files, "identify", lambda *_: mine)
    assert call(*words, f"--audio={tmp_path}/in", f"--out={tmp_path}/out") == 1
    assert "long.wav: the model computed NaN or infinity from 0." in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["short.json", "short.wav"]
    for how in (sound, [sound[0], "--prompt_sec=0.08"]):
        assert call(*words, f"--audio={tmp_path}/in/long.wav", *how) == 1
        said = capsys.readouterr().err
        assert "NaN or infinity" in said and "Traceback" not in said
        assert not (tmp_path / "x.wav").exists() and session.read_bytes() == kept
    assert not [*tmp_path.rglob("*.part")]


def test_the_report_says_what_ttt_did_and_when(trained: Path, tmp_path: Path) -> None:
    record(tmp_path / "in/a.wav", 17 * 1920, seed=1)
    record(tmp_path / "in/b.wav", 9 * 1920, seed=2)
    words = [f"--checkpoint={trained}", f"--audio={tmp_path}/in", f"--out={tmp_path}/out", *GREEDY]
    assert call(*words, f"--report={tmp_path}/report") == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["update_frames"] == 5 and report["layers"] == [0, 1]
    first, second = report["recordings"]
    assert [chunk["end_sec"] for chunk in first["chunks"]] == [0.4, 0.8, 1.2, 1.36]
    assert len(second["chunks"]) == 2
    for layer in ("0", "1"):
        values = [chunk["layers"][layer] for chunk in first["chunks"]]
        # It reads what was written in chunks before; the first step, which hears nothing, counts.
        assert values[0]["written"] == pytest.approx(values[0]["change"], rel=1e-4)
        assert all(value["written"] > 0 for value in values[:3]) and values[3]["written"] == 0
        assert values[3]["change"] == pytest.approx(values[2]["change"])
        assert 0 < values[0]["effect"] < values[2]["effect"]
    said = json.loads((tmp_path / "out/a.json").read_text())["alignments"]
    assert [w["word"] for w in first["words"]] == [word for word, _, _ in said]
    page = (tmp_path / "report/report.html").read_text()
    assert "a.wav" in page and "<svg" in page and not re.search(r"(src|href)=.?http", page)

    words[0] = f"--checkpoint={write_model(tmp_path / 'stock')}"
    assert call(*words, f"--report={tmp_path}/none") == 1


@pytest.mark.slow
def test_three_hours_take_no_more_memory_than_their_first_minutes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, resampling, writing and the words, that is: the model's own state has a fixed size,
    and here it only repeats a word every 4 s."""
    rate_hz, num_frames = 8000, 3 * 3600 * 25 // 2
    long = tmp_path / "long.wav"
    num_bytes = 3 * 3600 * rate_hz * 2
    header = struct.pack(
        "<4sI8sIHHIIHH4sI",
        *(b"RIFF", 36 + num_bytes, b"WAVEfmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16),
        *(b"data", num_bytes),
    )
    with long.open("wb") as file:
        file.write(header)
        # Silence that takes no room on the disk.
        file.truncate(len(header) + num_bytes)
    spoken, memory_mb = Spoken(3, np.zeros(1920, np.float32)), []
    pieces = tiny_tokenizer()
    word = next(i for i in range(pieces.vocab_size()) if re.match("▁[a-z]", pieces.id_to_piece(i)))

    def step(engine: Engine, frames: dict[int, np.ndarray]) -> dict[int, Spoken]:
        (row,) = frames
        engine.rows[row].num_frames += 1
        if engine.rows[row].num_frames % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory_mb.append(pages * 4096 / 1e6)
        spoken.text_token = word if engine.rows[row].num_frames % 50 == 0 else 3
        return {row: spoken}

    monkeypatch.setattr(Engine, "step", step)
    out = tmp_path / "out.wav"
    assert call(f"--checkpoint={trained}", f"--audio={long}", f"--out={out}", "--stereo") == 0
    assert soundfile.info(out).frames == num_frames * 1920
    assert len(json.loads(out.with_suffix(".json").read_text())["alignments"]) == num_frames // 50
    assert len(memory_mb) == num_frames // 1000
    # The user's voice alone, as numbers, is 1037 MB.
    assert max(memory_mb) - memory_mb[1] < 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--audio={tmp}/text.wav"], "cannot be read"),
        (["--audio={tmp}/empty.wav"], "is empty"),
        (["--audio={tmp}/none.wav"], "there is no file"),
        (["--audio={tmp}/folder"], "no recordings"),
        (["--audio={tmp}", "--out=/dev/null"], "is a pipe or a device"),
        (["--audio={tmp}", f"--out={__file__}"], "cannot be made (File exists)"),
        (["--audio={tmp}/ok.wav", "--out={tmp}/d.wav"], "d.wav, where an answer would go, is a fo"),
        (["--audio={tmp}/ok.wav", "--out={tmp}/e.wav"], "e.json, where an answer would go, is a f"),
        (["--input_dir={tmp}/none"], "no folder"),
        (["--input_dir={tmp}"], "no input.wav"),
        (["--input_dir={tmp}", "--audio=x"], "give a recording or a folder"),
        ([], "give a recording or a folder"),
        (["--audio={tmp}/ok.wav", "--out={tmp}/ok.wav"], "is the recording itself"),
        (
            ["--audio={tmp}/ok.wav", "--out={tmp}/folder/../ok.wav", "--prompt_sec=0.08"],
            "is the recording itself",
        ),
        (["--audio={tmp}/ok.wav", "--ttt=sometimes"], "must be on, off or reset:SECONDS"),
        (["--input_dir={tmp}", "--output_name=../x.wav"], "without a folder"),
        (["--input_dir={tmp}", "--input_name=*.wav"], "not a pattern"),
        *[
            (["--audio={tmp}/ok.wav", "--prompt_sec=1", option], "means nothing with --prompt_sec")
            for option in ("--session=x", "--stereo", "--user_channel=left", "--batch_size=2")
        ],
        (["--audio={tmp}/ok.wav", "--missing", "--prompt_sec=1"], "means nothing with --prompt"),
        (["--audio={tmp}/ok.wav", "--missing", "--overwrite"], "the answers that --overwrite repl"),
        (["--audio={tmp}/ok.wav", "--session_part=memory"], "means nothing without --session"),
        (["--audio={tmp}/ok.wav", "--input_name=a.wav"], "means nothing without --input_dir"),
    ],
)
def test_a_mistake_is_one_message(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, message: Any
) -> None:
    (tmp_path / "text.wav").write_text("not a wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24000)
    record(tmp_path / "ok.wav", 4000, channels=2)
    before = (tmp_path / "ok.wav").read_bytes()
    for name in ("d.wav", "e.json", "folder"):
        (tmp_path / name).mkdir()
    words = [word.format(tmp=tmp_path) for word in words]
    if not any(word.startswith("--out=") for word in words) and "input_dir" not in "".join(words):
        words.append(f"--out={tmp_path}/out.wav")
    assert call(f"--checkpoint={trained}", *words, *GREEDY) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert (tmp_path / "ok.wav").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "d.wav",
        "e.json",
        "empty.wav",
        "folder",
        "ok.wav",
        "text.wav",
    ]


def test_more_conversations_than_memory_are_one_message(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(StreamingMultiheadAttention, "_init_streaming_state", none_left)
    record(tmp_path / "ok.wav", 4000)
    for command, words, message in (
        ("generate", [f"--audio={tmp_path}/ok.wav", f"--out={tmp_path}/x.wav"], "--batch_size: 1"),
        ("serve", ["--port=0", "--max_users=3"], "--max_users: 3"),
    ):
        monkeypatch.setattr(sys, "argv", ["moshi-ttt", command, f"--checkpoint={trained}", *words])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr().err
        assert leaving.value.code == 1 and message in said and "Traceback" not in said


def test_the_server_is_a_command_that_ends_when_it_is_asked_to(
    trained: Path, tmp_path: Path
) -> None:
    words = ["serve", f"--checkpoint={trained}", "--port=0", "--max_users=2", "--device=cpu"]
    process = Program(COMMAND, *words)
    lines: list[Any] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "listening" in line:
            break
    assert "listening" in lines[-1], lines
    url = json.loads(lines[-1][lines[-1].index("{") :])["url"]
    with urllib.request.urlopen(f"{url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    port = url.rsplit(":", 1)[1]
    second = Program(COMMAND, *words[:2], f"--port={port}", stderr_apart=True)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1 and errors.count("\n") == 2
    assert f"127.0.0.1:{port} cannot be listened on" in errors
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped" in rest and "Traceback" not in rest


def test_the_base_may_be_kept_in_fewer_bits(trained: Path, tmp_path: Path) -> None:
    record(tmp_path / "a.wav", 24000, seed=1)
    answers = {}
    for kind in ("bfloat16", "nf4"):
        words = [f"--checkpoint={trained}", f"--audio={tmp_path}/a.wav", *GREEDY]
        assert call(*words, f"--out={tmp_path}/{kind}.wav", f"--base_precision={kind}") == 0
        answers[kind], _ = soundfile.read(tmp_path / f"{kind}.wav")
    assert answers["nf4"].shape == answers["bfloat16"].shape
    assert not np.array_equal(answers["nf4"], answers["bfloat16"])
    assert call(*words, f"--out={tmp_path}/x.wav", "--base_precision=int3") == 1
