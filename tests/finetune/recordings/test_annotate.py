"""`moshi-ttt data annotate`: when each word is said."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from recordings_tools import (
    DIALOGUES,
    NAMES,
    call,
    findings_of,
    mono_folder,
    plain_folder,
    true_words,
)

from finetune.data import HOP_SEC, power_of, wordless_speech
from finetune.recordings.align import SAMPLE_RATE_HZ, Aligner, heard_hops
from finetune.recordings.spoken import sounds_of, spoken_form
from finetune.recordings.work import RecordingError
from finetune.spoken.speech import Voice, synthesize


def listed(folder: Path, names: Sequence[str] = NAMES) -> Path:
    plain_folder(folder, names)
    assert call("data", "index", folder) == 0
    return folder / "data.jsonl"


def transcript(path: Path) -> Any:
    return json.loads(path.read_text())["alignments"]


def test_words_start_where_they_are_said_in_the_speech_of_the_demonstration(tmp_path: Path) -> None:
    assert call("data", "annotate", listed(tmp_path)) == 0
    errors_sec: list[Any] = []
    for name in NAMES:
        for speaker in ("SPEAKER_MAIN", "SPEAKER_USER"):
            true = true_words(name, speaker)
            found = [
                (w, *t) for w, t, who in transcript(tmp_path / f"{name}.json") if who == speaker
            ]
            assert [word for word, *_ in found] == [word for word, *_ in true]
            errors_sec += [abs(a[1] - b[1]) for a, b in zip(found, true, strict=True)]
            assert all(start < end for _, start, end in found)
    assert np.median(errors_sec) < 0.08 and np.quantile(errors_sec, 0.9) < 0.2


@pytest.mark.slow
def test_words_start_where_they_are_said_in_other_voices_and_longer_dialogues(
    tmp_path: Path,
) -> None:
    from finetune.demo import make_dialogues

    make_dialogues(tmp_path / "made", num_dialogues=4, seed=5)
    aligner, errors_sec = Aligner(), []
    for path in sorted((tmp_path / "made").glob("*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == 24_000
        at_16_khz = np.stack([_at_16_khz(channel) for channel in samples.T])
        for channel, speaker in enumerate(["SPEAKER_MAIN", "SPEAKER_USER"]):
            words = [e for e in transcript(path.with_suffix(".json")) if e[2] == speaker]
            times = aligner.align(at_16_khz[channel], [word for word, *_ in words])
            errors_sec += [abs(t[0] - w[1][0]) for t, w in zip(times, words, strict=True)]
    assert len(errors_sec) > 200
    assert np.median(errors_sec) < 0.08 and np.quantile(errors_sec, 0.95) < 0.2


def _at_16_khz(samples: np.ndarray) -> np.ndarray:
    import torch
    from torchaudio.functional import resample

    return resample(torch.from_numpy(np.ascontiguousarray(samples)), 3, 2).numpy()


def speech(text: str, *, pause_sec: float = 0.0) -> tuple[Any, list[float]]:
    """Float samples at 16 kHz, each sentence of a text after a pause; starts of the sentences."""
    pieces, starts, position = [], [], 0
    for sentence in text.split("|"):
        pause = np.zeros(round(pause_sec * SAMPLE_RATE_HZ))
        spoken = _at_16_khz(synthesize(sentence, Voice("en-us+m3")).samples)
        starts.append((position + len(pause)) / SAMPLE_RATE_HZ)
        position += len(pause) + len(spoken)
        pieces += [pause, spoken]
    return np.concatenate(pieces), starts


def test_a_word_is_not_put_into_the_silence_before_it() -> None:
    samples, starts = speech("Thank you for the tea.|I like it very much.", pause_sec=6.0)
    words = ["Thank", "you", "for", "the", "tea.", "I", "like", "it", "very", "much."]
    times = Aligner().align(samples, words)
    assert times[0][0] == pytest.approx(starts[0], abs=0.15)
    assert times[5][0] == pytest.approx(starts[1], abs=0.15)


def test_numbers_hyphens_and_unknown_names_are_one_word_each() -> None:
    text = "On Monday twenty-one people met Zorblax at 10:30 in room 42."
    samples, _ = speech(text)
    times = Aligner().align(samples, text.split())
    assert len(times) == len(text.split())
    starts = [start for start, _ in times]
    assert starts == sorted(starts) and times[-1][1] <= len(samples) / SAMPLE_RATE_HZ


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("morning,", "morning"),
        ("don’t", "don't"),
        ("Twenty-one", "twenty one"),
        ("42%", "forty two percent"),
        ("1,250", "twelve fifty"),
        ("1999.", "nineteen ninety nine"),
        ("2026", "two thousand twenty six"),
        ("3.5", "three point five"),
        ("1st", "one"),
        ("007", "zero zero seven"),
        ("café", "cafe"),
        ("—", ""),
        ("привет", ""),
    ],
)
def test_what_is_written_is_said(written: str, said: str) -> None:
    assert " ".join(spoken_form(written)) == said


def test_unknown_words_get_sounds_of_the_dictionary() -> None:
    known = {"tree": "T R IY", "b": "B IY", "r": "AA R"}.get
    assert sounds_of("trees", known) == "T R IY Z"
    assert sounds_of("brr", known) == "B IY AA R AA R"
    assert sounds_of("shack", known) == "SH AE K"


def test_long_silences_are_left_out_and_short_pauses_kept() -> None:
    samples = np.zeros(16_000 * 10)
    samples[16_000:32_000] = 0.5
    samples[36_000:48_000] = 0.5  # after 0.25 s
    samples[128_000:144_000] = 0.5  # after 5 s
    kept = heard_hops(samples)
    assert set(range(100, 300)) <= set(kept) and set(range(800, 900)) <= set(kept)
    assert not set(range(330, 770)) & set(kept)
    assert not len(heard_hops(np.zeros(16_000)))


def test_a_text_of_another_recording_is_refused() -> None:
    samples, _ = speech("Thank you for the tea. I like it very much.")
    with pytest.raises(RecordingError, match="does not fit"):
        Aligner().align(
            samples, ["Every", "winter", "they", "went", "skating", "on", "frozen", "lakes"]
        )
    with pytest.raises(RecordingError, match="80 words"):
        Aligner().align(samples, ["word"] * 80)


def test_a_short_text_of_another_recording_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An aligner finds places for few words in nearly any speech."""
    jsonl = listed(tmp_path, NAMES[:2])
    (tmp_path / "train_000.left.txt").write_text("Frozen lakes")
    assert call("data", "annotate", jsonl) == 0
    said = capsys.readouterr().out
    assert "warning: much of what is said has no words, in 1:" in said
    assert "laughter, music and the other side's echo need none" in said
    assert re.search(r"train_000\.wav, left channel: [4-9]\d% of it", said)
    assert "train_001.wav, " not in said and "right channel" not in said
    assert findings_of(jsonl) == (
        0,
        {"train_000": {"few-words"}, "train_001": set(), "together": set()},
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("below_db", [np.inf, 10])
def test_what_is_quieter_than_speech_needs_no_words(name: str, below_db: float) -> None:
    """Also where it goes on for long before and after, and there is silence or noise alone."""
    samples, rate = soundfile.read(DIALOGUES / f"{name}.wav")
    hop = round(HOP_SEC * rate)
    for channel, speaker in enumerate(["SPEAKER_MAIN", "SPEAKER_USER"]):
        spans = [(start + 40, end + 40) for _, start, end in true_words(name, speaker)]
        padded = np.pad(samples, ((40 * rate, 40 * rate), (0, 0))).T[[channel, 1 - channel]]
        voice = np.concatenate([padded[0, int(a * rate) : int(b * rate)] for a, b in spans])
        noise = np.random.default_rng(0).normal(0, voice.std(), padded.shape[1])
        padded[0] += noise * 10 ** (-below_db / 20)
        assert not wordless_speech(power_of(padded, hop), spans, HOP_SEC).is_much


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("below_db", [5, 8])
@pytest.mark.parametrize("delay_sec", [0.0, 0.12])
def test_the_echo_of_the_other_side_needs_no_words(
    name: str, below_db: float, delay_sec: float
) -> None:
    """Beside a few words of a quiet speaker. What the other channel does not have is none."""
    samples, rate = soundfile.read(DIALOGUES / f"{name}.wav")
    hop, delay_samples = round(HOP_SEC * rate), round(delay_sec * rate)
    for channel, speaker in enumerate(["SPEAKER_MAIN", "SPEAKER_USER"]):
        own, other = np.tile(samples.T[[channel, 1 - channel]], 3)
        words = true_words(name, speaker)
        spans = [(start, end) for _, start, end in words[len(words) // 2 :][:3]]
        quiet = np.zeros_like(own)
        for start, end in spans:
            said = slice(int(start * rate), int(end * rate))
            quiet[said] = own[said] / 4
        echo = np.pad(other, (delay_samples, 0))[: len(other)] * 10 ** (-below_db / 20)
        heard = quiet + echo
        assert not wordless_speech(power_of(np.stack([heard, other]), hop), spans, HOP_SEC).is_much
        # The same below what is as loud as the other voice, and no source of it.
        noise = np.random.default_rng(0).normal(0, other[np.abs(other) > 0.01].std(), len(other))
        beside = np.stack([heard, noise])
        assert wordless_speech(power_of(beside, hop), spans, HOP_SEC).is_much


def test_mistakes_are_named_at_the_end_and_all_others_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl = listed(tmp_path, NAMES)
    (tmp_path / "train_001.left.txt").unlink()
    for name in NAMES:
        shutil.copy(tmp_path / "train_000.wav", tmp_path / f"x_{name}.wav")
    (tmp_path / "x_train_000.txt").write_text("Hello, there\n")
    (tmp_path / "x_eval_000.txt").write_text("A: привет\n")
    left, right = (tmp_path / f"eval_000.{side}.txt" for side in ("left", "right"))
    texts = left.read_text(), right.read_text()
    left.write_text(texts[1]), right.write_text(texts[0])
    assert call("data", "index", tmp_path, "--overwrite") == 0
    capsys.readouterr()
    assert call("data", "annotate", jsonl) == 1
    said = capsys.readouterr()
    assert "wrote 1 transcript with" in said.out
    for message in (
        "train_001.wav has a text of the user, train_001.right.txt, but none of Moshi",
        "x_train_000.txt, line 1, does not say who speaks",
        "x_train_001.wav has no text: write NAME.left.txt",
        "x_eval_000.txt has words that the English aligner cannot say, such as 'привет'",
        "it fits the other channel; swap the channels or the texts",
    ):
        assert message in said.err
    assert [path.name for path in tmp_path.glob("*.json")] == ["train_000.json"]


def test_one_text_of_both_says_who_speaks(tmp_path: Path) -> None:
    jsonl = listed(tmp_path, ["train_000"])
    for side in ("left", "right"):
        (tmp_path / f"train_000.{side}.txt").unlink()
    (tmp_path / "train_000.txt").write_text(
        "\ufeffB: Hello, [laughs] Oscar.\n"
        "moshi: Good to hear you, — I was\njust running with my neighbor.\n"
    )
    assert call("data", "annotate", jsonl) == 0
    found = transcript(tmp_path / "train_000.json")
    expected = [(word, who) for word, _, who in transcript(DIALOGUES / "train_000.json")]
    assert [(word, who) for word, _, who in found] == expected


@pytest.mark.parametrize("by", ["option", "run"])
def test_moshi_may_be_on_the_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    jsonl = listed(tmp_path, ["train_000", "train_001"])
    (tmp_path / "train_001.right.txt").unlink()
    words: list[Any] = [jsonl, "--main_channel=right"]
    if by == "run":
        run: dict[str, Any] = {"data": {"train_data": str(jsonl), "main_channel": "right"}}
        run |= {"run_dir": str(tmp_path / "run"), "full_finetuning": True}
        words = [tmp_path / "run.yaml"]
        words[0].write_text(json.dumps(run))
        assert call("data", "annotate", *words, "--main_channel=left") == 1
        assert "run.yaml says data.main_channel: right" in capsys.readouterr().err
    assert call("data", "annotate", *words, "--workers=1") == 1
    assert "none of Moshi: write train_001.right.txt" in capsys.readouterr().err
    found = transcript(tmp_path / "train_000.json")
    other: dict[str, Any] = {"SPEAKER_MAIN": "SPEAKER_USER", "SPEAKER_USER": "SPEAKER_MAIN"}
    true = transcript(DIALOGUES / "train_000.json")
    assert [(word, other[who]) for word, _, who in found] == [(word, who) for word, _, who in true]


def test_what_is_done_is_not_done_again_and_texts_that_changed_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl = listed(tmp_path, ["train_000", "eval_000"])
    (tmp_path / "train_000.json").write_text(json.dumps({"alignments": []}))
    assert call("data", "annotate", jsonl) == 0
    assert transcript(tmp_path / "train_000.json") == [], "it was there already"
    assert transcript(tmp_path / "eval_000.json")
    later = (tmp_path / "eval_000.json").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "eval_000.left.txt", ns=(later, later))
    capsys.readouterr()
    assert call("data", "annotate", jsonl) == 0
    assert "1 transcript is older than its text (eval_000.wav" in capsys.readouterr().out
    assert call("data", "annotate", jsonl, "--overwrite") == 0
    assert transcript(tmp_path / "train_000.json")


def test_two_mono_files_have_their_words_beside_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From mono files to data that can be trained on, without a stereo file."""
    folder = mono_folder(tmp_path / "mono", ["train_000"])
    pattern = "{id}_left.wav,{id}_right.wav"
    assert call("data", "index", folder, "--pair", pattern) == 0
    jsonl = listed(tmp_path / "stereo", ["train_000"])
    for each in (folder / "data.jsonl", jsonl):
        assert call("data", "annotate", each, "--workers=1") == 0
    of_two, of_one = (
        transcript(path)
        for path in (folder / "train_000_left.json", tmp_path / "stereo/train_000.json")
    )
    assert [(word, who) for word, _, who in of_two] == [(word, who) for word, _, who in of_one]
    starts = [times[0] for _, times, _ in of_one]
    # The aligner adapts to what it heard before.
    assert [times[0] for _, times, _ in of_two] == pytest.approx(starts, abs=0.05)
    assert not (folder / "train_000_right.json").exists()
    assert call("data", "check", folder / "data.jsonl", "--workers=1") == 0
    assert "0 with errors, 0 with warnings" in capsys.readouterr().out

    (folder / "train_000_left.json").rename(folder / "train_000_right.json")
    assert call("data", "annotate", folder / "data.jsonl", "--workers=1") == 1
    assert "would be that of Moshi alone" in " ".join(capsys.readouterr().err.split())
    (folder / "train_000_left.txt").unlink()
    assert call("data", "annotate", folder / "data.jsonl", "--workers=1") == 1
    assert "write train_000_left.txt" in " ".join(capsys.readouterr().err.split())


def test_where_words_are_in_the_data_there_is_nothing_to_annotate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "codes.npz", a=np.zeros((17, 25), np.int16))
    assert call("data", "annotate", tmp_path / "codes.npz") == 1
    assert "in this layout the words stand in the data themselves" in capsys.readouterr().err


def test_whisper_writes_the_words_of_both_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module in its place: no model can be had here."""
    calls: list[Any] = []

    class WhisperModel:
        def __init__(self, model: Any, device: Any) -> None:
            calls.append((model, device))

        def transcribe(
            self, samples: Any, **options: Any
        ) -> tuple[Iterator[SimpleNamespace], None]:
            assert samples.dtype == np.float32 and options["word_timestamps"]
            calls.append(options["language"])
            first = int(np.flatnonzero(np.abs(samples) > 0.01)[0]) / SAMPLE_RATE_HZ
            words = [SimpleNamespace(word=" Hi", start=np.float64(first), end=first + 0.2)]
            words.append(SimpleNamespace(word="  ", start=first, end=first))
            return iter([SimpleNamespace(words=words), SimpleNamespace(words=None)]), None

    module = ModuleType("faster_whisper")
    monkeypatch.setattr(module, "WhisperModel", WhisperModel, raising=False)
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    jsonl = listed(tmp_path, ["train_000"])
    words = ["--engine=whisper", "--model=some/folder", "--language=fr", "--device=cpu"]
    assert call("data", "annotate", jsonl, *words) == 0
    assert calls == [("some/folder", "cpu"), "fr", "fr"]
    user, moshi = transcript(tmp_path / "train_000.json")
    assert (user[0], user[2]) == ("Hi", "SPEAKER_USER") and user[1][0] == pytest.approx(
        0.3, abs=0.1
    )
    assert moshi[2] == "SPEAKER_MAIN" and moshi[1][0] == pytest.approx(1.7, abs=0.1)


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [("align", "pocketsphinx", "annotate"), ("whisper", "faster_whisper", "whisper")],
)
def test_an_engine_that_is_not_installed_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    module: str,
    extra: str,
) -> None:
    jsonl = listed(tmp_path, ["train_000"])
    monkeypatch.setitem(sys.modules, module, None)
    assert call("data", "annotate", jsonl, f"--engine={engine}") == 1
    assert f"pip install 'moshi-ttt[{extra}]'" in capsys.readouterr().err
