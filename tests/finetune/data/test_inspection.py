"""What is wrong with recordings is found and named, each kind once, and nothing in good ones."""

import gzip
import json
import logging
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from data_tools import (
    WORDS,
    some_words,
    speech_like,
    tiny_codec,
    write_dataset,
    write_jsonl,
    write_recording,
)

from finetune.config import DataArgs
from finetune.data import (
    build_eval_loader,
    build_train_loader,
    inspect_recording,
    warn_if_shared,
)
from finetune.data.loader import TrainLoader
from finetune.errors import UserError

RATE_HZ = 24000
TEXT = tiny_codec().text


def train_loader(path: Path, **changes: Any) -> TrainLoader:
    args = DataArgs(train_data=str(path), num_workers=0, **changes)
    return build_train_loader(
        args, tiny_codec(), duration_sec=1.0, batch_size=2, seed=0, device="cpu", store=None
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


class Case:
    """A recording of 4 s that tests spoil."""

    def __init__(self, folder: Path) -> None:
        self.path, self.transcript = folder / "a.wav", folder / "a.json"
        write_recording(folder, "a.wav", 4.0)

    def audio(self, change: Any, **options: Any) -> None:
        samples, rate_hz = soundfile.read(self.path, dtype="float32")
        soundfile.write(self.path, change(samples), rate_hz, **options)

    def words(self, change: Any) -> None:
        self.transcript.write_text(json.dumps({"alignments": change(some_words(4.0))}))

    def content(self, **content: Any) -> None:
        self.transcript.write_text(json.dumps({"alignments": some_words(4.0)} | content))

    def found(self, *, thorough: Any, **options: Any) -> dict[str, Any]:
        inspection = inspect_recording(
            self.path, self.transcript, thorough=thorough, text=TEXT, **options
        )
        return {finding.code: finding for finding in inspection.findings}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def with_times(change: Callable[..., list[Any]]) -> Callable[..., list[list[Any]]]:
    return lambda words: [[text, change(*times), who] for text, times, who in words]


def silence(channel: int) -> Callable[..., Any]:
    def change(samples: np.ndarray) -> np.ndarray:
        samples[:, channel] = 0
        return samples

    return change


def only_while_speaking(samples: np.ndarray, *, channel: int) -> np.ndarray:
    """Sound on one channel while the words are spoken, and on the other between them."""
    loud = np.zeros(len(samples), bool)
    for _, (start, end), _ in some_words(4.0):
        loud[round(start * RATE_HZ) : round(end * RATE_HZ)] = True
    samples[:, channel] *= loud
    samples[:, 1 - channel] *= ~loud
    return samples


def loud_square(samples: np.ndarray) -> np.ndarray:
    samples[20000:30000, 0] = np.sign(samples[20000:30000, 0])
    return samples


ERRORS: dict[str, Any] = {
    "silent-channel": lambda case: case.audio(silence(0)),
    "channels-equal": lambda case: case.audio(lambda s: s[:, :1].repeat(2, axis=1)),
    "integer-units": lambda case: case.audio(lambda s: s * 20000, subtype="FLOAT"),
    "other-time-units": lambda case: case.words(with_times(lambda a, b: [a * 1e3, b * 1e3])),
    "words-after-the-end": lambda case: case.words(with_times(lambda a, b: [a + 5, b + 5])),
    "words-without-length": lambda case: case.words(with_times(lambda a, b: [a, a])),
    "transcript-malformed": lambda case: case.transcript.write_text("[]"),
    "transcript-missing": lambda case: case.transcript.unlink(),
    "truncated": lambda case: case.path.write_bytes(case.path.read_bytes()[:200_000]),
    "missing": lambda case: case.path.unlink(),
    "not-stereo": lambda case: case.audio(lambda s: s[:, 0]),
}
WARNINGS: dict[str, Any] = {
    "swapped-channels": lambda case: case.audio(lambda s: only_while_speaking(s, channel=1)),
    "negative-times": lambda case: case.words(
        lambda words: [["well", [-0.2, -0.1], "SPEAKER_MAIN"], *words]
    ),
    "unsorted-words": lambda case: case.words(lambda words: words[::-1]),
    "overlapping-words": lambda case: case.words(with_times(lambda a, b: [a, b + 0.6])),
    "sentences-as-words": lambda case: case.words(
        lambda words: [["hello there how are you", *words[0][1:]], *words[1:]]
    ),
    "unknown-characters": lambda case: case.words(
        lambda words: [["日本", *words[0][1:]], *words[1:]]
    ),
    "tokens-without-frame": lambda case: case.words(
        lambda words: [[" ".join(WORDS), *words[i][1:]] for i in range(len(words))]
    ),
    "no-main-speaker": lambda case: case.words(
        lambda words: [[text, times, "SPEAKER_00"] for text, times, _ in words]
    ),
    "other-spelling": lambda case: case.words(
        lambda words: [[*words[0][:2], "Speaker_Main"], *words[1:]]
    ),
    "unused-keys": lambda case: case.content(text_conditions={"mood": "calm"}),
}


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("code", [*ERRORS, *WARNINGS])
def test_each_kind_is_found(case: Case, code: str, thorough: bool) -> None:
    assert case.found(thorough=thorough, duration_sec=4.0) == {}
    (ERRORS | WARNINGS)[code](case)
    finding = case.found(thorough=thorough, duration_sec=4.0)[code]
    assert finding.severity == ("error" if code in ERRORS else "warning")
    assert "a.wav" in finding.message or "a.json" in finding.message
    assert finding.remedy


@pytest.mark.parametrize("code", ERRORS)
def test_errors_stop_a_run_and_are_skipped_if_wanted(case: Case, tmp_path: Path, code: str) -> None:
    good = write_recording(tmp_path, "good.wav", 2.0)
    ERRORS[code](case)
    lines = write_jsonl(tmp_path / "all.jsonl", [{"path": "a.wav", "duration": 4.0}, good])
    with pytest.raises(UserError, match=r"all\.jsonl:1: "):
        train_loader(lines)
    assert train_loader(lines, on_error="skip").num_segments == 2


def test_warnings_are_said_once_with_an_example_and_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl = write_dataset(tmp_path, [2.0, 2.0, 2.0])
    for name in ("0", "2"):
        words: dict[str, Any] = {"alignments": some_words(2.0), "text_conditions": 1}
        (tmp_path / f"{name}.json").write_text(json.dumps(words))
    with caplog.at_level(logging.WARNING):
        train_loader(jsonl)
    (said,) = warnings(caplog)
    assert said.startswith(f"data.train_data: {jsonl}:1: transcript {tmp_path / '0.json'} holds")
    assert "text_conditions" in said and said.endswith("[unused-keys] The same of 1 more.")


def test_clipping_is_heard_when_all_of_it_is_listened_to(case: Case) -> None:
    case.audio(loud_square)
    assert "clipping" in case.found(thorough=True)


def test_a_silent_user_who_has_words_is_heard_when_all_of_it_is_listened_to(case: Case) -> None:
    case.audio(silence(1))
    assert case.found(thorough=True) == {}  # nobody else has words
    case.words(lambda words: [*words, ["hm", [3.0, 3.2], "SPEAKER_USER"]])
    assert "silent-user" in case.found(thorough=True)


def test_the_reverse_of_swapped_is_fine(case: Case) -> None:
    case.audio(lambda samples: only_while_speaking(samples, channel=0))
    for thorough in (False, True):
        assert case.found(thorough=thorough) == {}


def test_speech_of_moshi_without_any_word_is_heard_when_all_of_it_is_listened_to(
    case: Case,
) -> None:
    for words in ([], [[" ", [0.1, 0.4], "SPEAKER_MAIN"]]):
        case.words(lambda _, words=words: words)
        found = case.found(thorough=True)
        assert [*found] == ["no-words"] and found["no-words"].severity == "warning"
        said = re.search(r"left channel, Moshi's, is loud for (\S+) s", found["no-words"].message)
        assert said is not None and 2.0 < float(said[1]) <= 4.0
        assert "data annotate" in found["no-words"].remedy
        assert case.found(thorough=False) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda samples: samples * [0.01, 1],  # a quiet room
        lambda samples: samples[:, [1, 1]] * [0.1, 1],  # an echo of the user
        lambda samples: samples * (np.arange(len(samples)) < 0.9 * RATE_HZ)[:, None],  # a cough
    ],
    ids=["quiet", "echo", "short"],
)
def test_a_side_without_words_may_be_heard_a_little(case: Case, change: Any) -> None:
    case.audio(change)
    case.words(lambda _: [])
    assert case.found(thorough=True) == {}


def test_who_lacks_words_is_told_from_who_has_another_name(case: Case) -> None:
    for speaker, remedy in (
        ("SPEAKER_USER", "add its words, with moshi-ttt data annotate --overwrite"),
        ("SPEAKER_00", "if 'SPEAKER_00' is Moshi, write 'SPEAKER_MAIN' in place of it"),
        ("Speaker_Main", "write 'SPEAKER_MAIN' in place of 'Speaker_Main': names count with"),
        ("SPEAKER_MAIN ", "write 'SPEAKER_MAIN' in place of 'SPEAKER_MAIN ': names count with"),
    ):
        case.words(lambda words, who=speaker: [[text, times, who] for text, times, _ in words])
        assert remedy in case.found(thorough=True)["no-main-speaker"].remedy


def test_words_of_moshi_under_another_spelling_of_its_name_are_named(case: Case) -> None:
    for speaker in ("Speaker_Main", " SPEAKER_MAIN", "speaker-main", "SPEAKER MAIN"):
        case.words(lambda words, who=speaker: [*words[:-1], [*words[-1][:2], who]])
        found = case.found(thorough=True)["other-spelling"]
        assert f"1 of 8 words in transcript {case.transcript} are of {speaker!r}" in found.message
        assert f"write 'SPEAKER_MAIN' in place of {speaker!r}" in found.remedy
    case.words(lambda words: [*words[:-1], [*words[-1][:2], "SPEAKER_USER"]])
    assert case.found(thorough=True) == {}


def test_words_after_the_end_are_in_another_unit_only_if_they_would_be_words_in_it(
    case: Case,
) -> None:
    case.audio(lambda samples: samples[: RATE_HZ // 10])
    case.words(lambda _: [["hello", [5.0, 5.3], "SPEAKER_MAIN"]])
    assert [*case.found(thorough=False)] == ["words-after-the-end"]
    case.words(lambda _: [["hello", [10, 90], "SPEAKER_MAIN"]])
    assert "milliseconds" in case.found(thorough=False)["other-time-units"].message


def test_two_silent_channels_are_not_swapped(case: Case) -> None:
    case.audio(lambda samples: 0 * samples)
    found = case.found(thorough=True)["silent-channel"]
    assert "both channels are silent" in found.message
    assert "data.main_channel" not in found.remedy and "swapped" not in found.remedy
    case.audio(lambda samples: samples + np.array([0, 0.1]))
    assert "data.main_channel to right" in case.found(thorough=True)["silent-channel"].remedy


def test_a_missing_transcript_names_the_command_that_makes_it(case: Case) -> None:
    case.transcript.unlink()
    found = case.found(thorough=True)
    assert [*found] == ["transcript-missing"]
    assert "moshi-ttt data annotate" in found["transcript-missing"].remedy


def test_a_few_bad_words_are_a_warning(case: Case) -> None:
    case.words(lambda words: [*words[:-1], ["late", [4.5, 4.8], "SPEAKER_MAIN"]])
    found = case.found(thorough=False)
    assert found["words-after-the-end"].severity == "warning"
    case.words(lambda words: [["hello", [0.1, 0.1], "SPEAKER_MAIN"], *words[1:]])
    assert case.found(thorough=False)["words-without-length"].severity == "warning"


# --- what transcripts may be ----------------------------------------------------------------------

ENCODED: dict[str, Any] = {
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-be"),
    "gzip": lambda text: gzip.compress(text.encode()),
}


@pytest.mark.parametrize("encode", ENCODED.values(), ids=ENCODED)
def test_encodings_of_transcripts_and_lists(case: Case, tmp_path: Path, encode: Any) -> None:
    case.transcript.write_bytes(encode(case.transcript.read_text()))
    lines = tmp_path / "all.jsonl"
    lines.write_bytes(encode('{"path": "a.wav", "duration": 4.0}\n'))
    batch = next(train_loader(lines))
    assert (batch.codes[:, 0] > 3).any()


def test_a_damaged_gzip_is_a_message(case: Case) -> None:
    case.transcript.write_bytes(gzip.compress(case.transcript.read_bytes())[:-20])
    assert (
        "gzip file that was cut off" in case.found(thorough=False)["transcript-malformed"].message
    )


def test_elements_after_the_third_are_not_read(case: Case) -> None:
    plain = next(train_loader(write_jsonl(case.path.with_suffix(".jsonl"),
                                          [{"path": "a.wav", "duration": 4.0}])))  # fmt: skip
    case.words(lambda words: [[*word, 0.9, {"model": "x"}] for word in words])
    more = next(train_loader(case.path.with_suffix(".jsonl")))
    assert (plain.codes == more.codes).all()


def test_empty_words_change_nothing(case: Case) -> None:
    lines = write_jsonl(case.path.with_suffix(".jsonl"), [{"path": "a.wav", "duration": 4.0}])
    case.words(lambda words: [["hello there", [0.3, 0.9], "SPEAKER_MAIN"]])
    plain = next(train_loader(lines))
    case.words(lambda words: [["hello there", [0.3, 0.9], "SPEAKER_MAIN"],
                              ["  ", [0.35, 0.5], "SPEAKER_MAIN"]])  # fmt: skip
    assert (next(train_loader(lines)).codes == plain.codes).all()


# --- lists ----------------------------------------------------------------------------------------


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [2.0])
    for name in ("._all.jsonl", ".ipynb_checkpoints/all.jsonl", "sub/.old.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"\0\5\x16\7")
    assert train_loader(tmp_path / "data").num_segments == 2
    (tmp_path / "data/all.jsonl").unlink()
    with pytest.raises(UserError, match=r"no \.jsonl file that is not hidden"):
        train_loader(tmp_path / "data")


def test_a_line_that_names_an_apple_double(tmp_path: Path) -> None:
    line = write_recording(tmp_path, "._a.wav", 2.0)
    with pytest.raises(UserError, match="what macOS leaves beside a file"):
        train_loader(write_jsonl(tmp_path / "all.jsonl", [line]))


def test_recordings_that_are_listed_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_dataset(tmp_path / "data", [2.0, 2.0, 2.0]).parent
    (folder / "link.wav").symlink_to("1.wav")
    (folder / "link.json").symlink_to("1.json")
    lines = (folder / "all.jsonl").read_text().splitlines()
    more: list[dict[str, Any] | str] = [*lines, lines[0], {"path": "link.wav", "duration": 2.0}]
    with caplog.at_level(logging.WARNING):
        train_loader(write_jsonl(folder / "all.jsonl", more))
    (said,) = warnings(caplog)
    assert "2 recordings are listed more than once" in said and "0.wav 2 times" in said


def test_names_in_two_unicode_forms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = write_recording(tmp_path, unicodedata.normalize("NFC", "Café.wav"), 2.0)
    other = unicodedata.normalize("NFD", "Café.wav")
    lines = write_jsonl(tmp_path / "all.jsonl", [line | {"path": other}])
    with pytest.raises(UserError, match="is missing: a file whose name looks the same is there"):
        train_loader(lines)
    for suffix in (".wav", ".json"):
        copy = (tmp_path / other).with_suffix(suffix)
        shutil.copy((tmp_path / line["path"]).with_suffix(suffix), copy)
    with caplog.at_level(logging.WARNING):
        train_loader(write_jsonl(tmp_path / "all.jsonl", [line, line | {"path": other}]))
    assert "differ in their Unicode form alone" in caplog.text


def test_evaluation_recordings_in_the_training_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_dataset(tmp_path / "train", [2.0, 2.0])
    other = write_dataset(tmp_path / "other", [2.0], seed=7)
    for evaluated, expected in ((other, 0), (train, 1)):
        args = DataArgs(train_data=str(train), eval_data=str(evaluated), num_workers=0)
        options: dict[str, Any] = {
            "duration_sec": 1.0,
            "batch_size": 2,
            "device": "cpu",
            "store": None,
        }
        training = build_train_loader(args, tiny_codec(), seed=0, **options)
        evaluation = build_eval_loader(args, tiny_codec(), **options)
        with caplog.at_level(logging.WARNING):
            warn_if_shared(training, evaluation)
        assert caplog.text.count("2 of 2 recordings of data.eval_data are in") == expected


def test_good_speech_has_no_findings(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", speech_like(3.0, 44100), 44100)
    (tmp_path / "a.json").write_text(json.dumps({"alignments": some_words(3.0)}))
    for thorough in (False, True):
        found = inspect_recording(
            tmp_path / "a.flac", tmp_path / "a.json", thorough=thorough, text=TEXT
        )
        assert found.findings == []
        assert (found.duration_sec, found.sample_rate_hz, found.num_channels) == (3.0, 44100, 2)
