"""Broken data is named with its file, its line and what to do, or left out and counted."""

import json
import logging
import os
import signal
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import soundfile
import torch
from data_tools import speech_like, tiny_codec, write_jsonl, write_recording
from forked import Program

from finetune.config import DataArgs
from finetune.data import build_eval_loader, build_train_loader
from finetune.data.loader import TrainLoader
from finetune.errors import UserError


def train_loader(
    path: Path,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    num_workers: int = 0,
    prefetch_steps: int = 0,
) -> TrainLoader:
    args = DataArgs(
        train_data=str(path),
        on_error=on_error,
        num_workers=num_workers,
        prefetch_steps=prefetch_steps,
    )
    return build_train_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=2, seed=0, device="cpu", store=None
    )


def cut_off(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def missing_wav(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    (folder / "bad.wav").unlink()
    return line


def truncated_wav(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    cut_off(folder / "bad.wav", 0.6)
    return line


def truncated_flac(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    soundfile.write(folder / "bad.flac", speech_like(2.0, 24000), 24000)
    cut_off(folder / "bad.flac", 0.6)
    return line | {"path": "bad.flac"}


def truncated_mp3(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    soundfile.write(folder / "bad.mp3", speech_like(2.0, 24000), 24000)
    cut_off(folder / "bad.mp3", 0.6)
    return line | {"path": "bad.mp3"}


def not_audio(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    (folder / "bad.wav").write_text("hello")
    return line


def mono(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    soundfile.write(folder / "bad.wav", speech_like(2.0, 24000, channels=1), 24000)
    return line


def four_channels(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    soundfile.write(folder / "bad.wav", speech_like(2.0, 24000, channels=4), 24000)
    return line


def wrong_duration(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    return line | {"duration": 2.2}


def no_audio(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    soundfile.write(folder / "bad.wav", speech_like(0.05, 24000), 24000)
    return line | {"duration": 0.05}


def missing_transcript(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    (folder / "bad.json").unlink()
    return line


def transcript_without_alignments(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    (folder / "bad.json").write_text('{"words": []}')
    return line


def transcript_with_malformed_alignment(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "alignments": [["a", [0, 1], "SPEAKER_MAIN"], ["b", [0.5], "SPEAKER_MAIN"]]
    }
    (folder / "bad.json").write_text(json.dumps(content))
    return line


def transcript_with_an_endless_time(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    content = '{"alignments": [["a", [0, 1e308], "SPEAKER_MAIN"]]}'
    (folder / "bad.json").write_text(content)
    return line


def transcript_not_json(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    (folder / "bad.json").write_text('{"alignments": [')
    return line


def malformed_line(folder: Path, line: dict[str, Any]) -> str:
    return '{"path": "bad.wav", "dura'


def line_without_duration(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    return {"path": "bad.wav"}


def line_with_text_as_duration(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    return line | {"duration": "2.0"}


def line_that_is_a_list(folder: Path, line: dict[str, Any]) -> str:
    return '["bad.wav", 2.0]'


BROKEN: dict[Callable[..., Any], str] = {
    missing_wav: "bad.wav is missing: correct the path, or remove its line",
    truncated_wav: "bad.wav is truncated",
    truncated_flac: "bad.flac is truncated",
    truncated_mp3: "bad.mp3 is truncated",
    not_audio: "bad.wav cannot be read",
    mono: "bad.wav is mono: expected stereo with Moshi on the left",
    four_channels: "bad.wav is made of 4 channels",
    wrong_duration: "wrong duration: it is listed with 2.2 s, but",
    no_audio: "shorter than one frame of 0.08 s: remove its line",
    missing_transcript: "bad.json is missing: make it with moshi-ttt data annotate",
    transcript_without_alignments: 'bad.json has no list "alignments": it must have the form',
    transcript_with_malformed_alignment: 'alignments[1] is ["b", [0.5], "SPEAKER_MAIN"], expected',
    transcript_with_an_endless_time: 'alignments[0] is ["a", [0, 1e+308], "SPEAKER_MAIN"]',
    transcript_not_json: "bad.json is not valid JSON",
    malformed_line: "malformed line: not JSON, column 21",
    line_without_duration: "malformed line: `duration` is missing",
    line_with_text_as_duration: 'malformed line: `duration` is "2.0", and must be a number',
    line_that_is_a_list: 'malformed line: ["bad.wav", 2.0] is no object',
}


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda function: function.__name__)
def test_broken_data_is_named_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, breaking: Callable[..., Any]
) -> None:
    good = write_recording(tmp_path, "good.wav", 2.0)
    bad = write_recording(tmp_path, "bad.wav", 2.0, seed=1)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [good, breaking(tmp_path, bad)])

    with pytest.raises(UserError) as error:
        train_loader(jsonl)
    assert f"{jsonl}:2: " in str(error.value)
    assert BROKEN[breaking] in str(error.value)
    assert f"{jsonl}:1" not in str(error.value)
    assert "data.on_error=skip" in str(error.value)

    with caplog.at_level(logging.WARNING):
        loader = train_loader(jsonl, on_error="skip")
    assert f"{jsonl}:2: " in caplog.text
    assert loader.num_skipped == 1 and loader.num_segments == 2
    assert (next(loader).codes[:, :, 0] >= 0).all()

    only_bad = write_jsonl(tmp_path / "b.jsonl", jsonl.read_text().splitlines()[1:])
    with pytest.raises(UserError, match="no usable recording is left"):
        train_loader(only_bad, on_error="skip")


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    lines = [{"path": f"{index}.wav", "duration": 1.0} for index in range(30)]
    with pytest.raises(UserError) as error:
        train_loader(write_jsonl(tmp_path / "a.jsonl", lines))
    message = str(error.value)
    # Each line lacks its recording and its transcript.
    assert "60 problems" in message and "… and 40 more" in message
    assert "a.jsonl:10: transcript" in message and "a.jsonl:11:" not in message


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: write_jsonl(folder / "a.jsonl", [""]), "a.jsonl is empty: it needs"),
        (lambda folder: folder, "holds no .jsonl file"),
        (lambda folder: folder / "b.jsonl", "b.jsonl does not exist"),
        (lambda folder: f"{folder}:0", "weights must be positive"),
        (lambda folder: f"{folder}:-1", "weights must be positive"),
        (lambda folder: "", "data.train_data is empty"),
    ],
)
def test_a_source_with_nothing_in_it(
    tmp_path: Path, on_error: Literal["raise", "skip"], prepare: Callable[..., Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        train_loader(prepare(tmp_path), on_error=on_error)


def test_eval_data_is_named_by_its_own_key() -> None:
    with pytest.raises(UserError, match=r"data\.eval_data is empty"):
        build_eval_loader(
            DataArgs(), tiny_codec(), duration_sec=1.0, batch_size=1, device="cpu", store=None
        )


def test_wav_of_unknown_length_is_not_truncated(tmp_path: Path) -> None:
    # ffmpeg writes this when its output is a pipe.
    line = write_recording(tmp_path, "a.wav", 1.0)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "a.wav").write_bytes(content)
    assert train_loader(write_jsonl(tmp_path / "a.jsonl", [line])).num_segments == 1


def test_transcripts_without_the_main_speaker_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [write_recording(tmp_path, name, 1.0) for name in ("a.wav", "good.wav")]
    (tmp_path / "a.json").write_text('{"alignments": [["hi", [0.1, 0.3], "SPEAKER_00"]]}')
    with caplog.at_level(logging.WARNING):
        train_loader(write_jsonl(tmp_path / "a.jsonl", lines))
    assert "none of SPEAKER_MAIN" in caplog.text


def vanish(folder: Path) -> None:
    (folder / "bad.flac").unlink()


def corrupt_the_middle(folder: Path) -> None:
    content = bytearray((folder / "bad.flac").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(range(250)) * 12
    (folder / "bad.flac").write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("breaking", [vanish, corrupt_the_middle])
def test_file_that_breaks_after_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int, breaking: Callable[..., Any]
) -> None:
    bad = write_recording(tmp_path, "bad.flac", 1.0, seed=1)
    good = write_recording(tmp_path, "good.wav", 1.0)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [bad, good])
    strict = train_loader(jsonl, num_workers=num_workers)
    lenient = train_loader(jsonl, on_error="skip", num_workers=num_workers)
    breaking(tmp_path)

    with pytest.raises(UserError) as error:
        next(strict)
    assert f"{jsonl}:1: " in str(error.value) and "bad.flac cannot be read" in str(error.value)
    assert "copy or convert it again, or remove its line. " in str(error.value)
    assert error.value.__cause__ is None

    with caplog.at_level(logging.WARNING):
        batch = next(lenient)
    lenient.close()
    assert "bad.flac cannot be read" in caplog.text
    assert (batch.codes[0] == -1).all() and (batch.codes[1] >= 0).all()
    assert batch.num_skipped == 1 and lenient.num_skipped == 1
    assert torch.isfinite(torch.tensor(batch.audio_sec)) and batch.audio_sec == pytest.approx(1.04)


def beside_these_tests(program: str) -> Program:
    """A program of its own that may import from here."""
    here = Path(__file__).parent
    places = [str(here.parents[1]), str(here)]
    return Program(f"import sys; sys.path[:0] = {places}\n{program}", stderr_apart=True)


def test_a_worker_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """Else the program waits for it, at its end, for ever."""
    line = write_recording(tmp_path, "a.wav", 2.0)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [line])
    program = textwrap.dedent(
        f"""
        import multiprocessing, os, signal
        from test_data_errors import train_loader
        loader = train_loader({str(jsonl)!r}, num_workers=1, prefetch_steps=0)
        next(loader)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        raise SystemExit("the end")
        """
    )
    process = beside_these_tests(program)
    try:
        assert process.communicate(timeout=60) == ("", "the end\n")
    finally:
        process.kill()


def test_a_program_ends_while_its_loader_waits_for_a_worker(tmp_path: Path) -> None:
    """Workers that were ended before the thread that reads from them left it waiting for ever."""
    line = write_recording(tmp_path, "a.wav", 2.0)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [line])
    program = textwrap.dedent(
        f"""
        import time
        from test_data_errors import train_loader
        from finetune.data.segments import SegmentReader
        read = SegmentReader.__getitem__
        def slowly(self, ref):
            time.sleep(1.0)
            return read(self, ref)
        SegmentReader.__getitem__ = slowly
        loader = train_loader({str(jsonl)!r}, num_workers=1, prefetch_steps=2)
        next(loader)
        raise SystemExit("the end, without close()")
        """
    )
    process = beside_these_tests(program)
    try:
        assert process.communicate(timeout=60) == ("", "the end, without close()\n")
    finally:
        process.kill()


def test_workers_leave_signals_to_the_trainer_and_end_with_it(tmp_path: Path) -> None:
    """Those of a loader that reads ahead, and of one that does not."""
    line = write_recording(tmp_path, "a.wav", 2.0)
    jsonl = write_jsonl(tmp_path / "a.jsonl", [line])
    program = textwrap.dedent(
        f"""
        import signal, time
        from test_data_errors import train_loader
        received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
        loaders = [
            train_loader({str(jsonl)!r}, num_workers=2, prefetch_steps=steps) for steps in (0, 2)
        ]
        for loader in loaders:
            next(loader)
        print("ready", flush=True)
        for expected in ("SIGINT", "SIGTERM"):
            while expected not in received:
                time.sleep(0.05)
            for loader in loaders:
                [next(loader) for _ in range(10)]  # the workers are still there
            print(*received, flush=True)
        raise SystemExit("the end, without close()")
        """
    )
    process = beside_these_tests(program)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    os.killpg(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output == "SIGINT SIGTERM\n"
    assert errors == "the end, without close()\n"
