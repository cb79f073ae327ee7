"""`moshi-ttt data index`: from a folder to the JSONL that training reads."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from recordings_tools import DIALOGUES, NAMES, call, lines_of, mono_folder, plain_folder

from finetune.data import Reading, list_entries
from finetune.recordings import pairs

PAIR = "{id}_left.wav,{id}_right.wav"


def test_all_recordings_are_listed_with_their_lengths_and_paths_from_the_jsonl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain_folder(tmp_path / "talks/2026")
    samples, rate = soundfile.read(DIALOGUES / "eval_000.wav")
    soundfile.write(folder / "b.flac", samples[:24_000], rate)
    soundfile.write(folder / "c.ogg", samples[:48_000], rate)
    assert call("data", "index", tmp_path / "talks") == 0
    lines = lines_of(tmp_path / "talks/data.jsonl")
    lengths = {line["path"]: line["duration"] for line in lines}
    assert lengths == {
        **{f"2026/{name}.wav": 5.0 for name in NAMES},
        "2026/b.flac": 1.0,
        "2026/c.ogg": 2.0,
    }
    assert list(lengths) == sorted(lengths)
    said = capsys.readouterr().out
    assert "5 recordings" in said and "next: 5 have no transcript (.json); moshi-ttt data" in said


def test_what_is_compressed_is_measured_as_it_is_decoded(tmp_path: Path) -> None:
    samples, rate = soundfile.read(DIALOGUES / "eval_000.wav", dtype="float32")
    with av.open(str(tmp_path / "a.m4a"), "w") as file:
        stream = file.add_stream("aac", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples.T.copy(), format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    assert call("data", "index", tmp_path) == 0
    (line,) = lines_of(tmp_path / "data.jsonl")
    assert line["path"] == "a.m4a" and line["duration"] == pytest.approx(5.0, abs=0.1)


def test_hidden_files_are_passed_over_and_broken_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain_folder(tmp_path / "talks", ["train_000"])
    shutil.copy(folder / "train_000.wav", folder / "._train_000.wav")
    (folder / ".trash").mkdir()
    shutil.copy(folder / "train_000.wav", folder / ".trash/old.wav")
    (folder / "broken.wav").write_text("no audio")
    soundfile.write(folder / "mono.wav", np.zeros(24_000), 24_000)
    soundfile.write(folder / "nothing.wav", np.zeros((0, 2)), 24_000)
    assert call("data", "index", folder) == 0
    assert [line["path"] for line in lines_of(folder / "data.jsonl")] == ["train_000.wav"]
    said = capsys.readouterr().out
    assert "passed over 1 hidden" in said
    assert "broken.wav cannot be read" in said
    assert "copy or convert it again" in said and "remove its line" not in said  # there is none yet
    assert "mono.wav is mono" in said and "--pair" in said
    assert "nothing.wav is empty: record or copy it again" in said


def test_names_that_a_jsonl_cannot_hold_or_a_reader_would_misread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain_folder(tmp_path / "talks", ["train_000"])
    shutil.copy(DIALOGUES / "train_000.json", folder)
    for name in ("~mine", "a:2", os.fsdecode(b"caf\xe9")):
        for suffix in (".wav", ".json"):
            shutil.copy(folder / f"train_000{suffix}", folder / f"{name}{suffix}")
    assert call("data", "index", folder) == 0
    assert {line["path"] for line in lines_of(folder / "data.jsonl")} == {
        "train_000.wav",
        str(folder / "~mine.wav"),
        str(folder / "a:2.wav"),
    }
    assert "caf\\udce9.wav' is not called so in UTF-8" in capsys.readouterr().out
    listed = list_entries(folder / "data.jsonl", "data", Reading())
    assert all(entry.recording and entry.recording.path.is_file() for entry in listed)


def test_a_jsonl_elsewhere_has_whole_paths_and_training_reads_it(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "talks", ["train_000"])
    shutil.copy(DIALOGUES / "train_000.json", folder)
    assert call("data", "index", folder, "--out", tmp_path / "lists/all.jsonl") == 0
    (line,) = lines_of(tmp_path / "lists/all.jsonl")
    assert line["path"] == str(folder / "train_000.wav")
    assert call("data", "check", tmp_path / "lists/all.jsonl") == 0


def test_nothing_is_replaced_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain_folder(tmp_path, ["train_000"])
    (folder / "data.jsonl").write_text("mine")
    assert call("data", "index", folder) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "data.jsonl").read_text() == "mine"
    assert call("data", "index", folder, "--overwrite") == 0
    assert len(lines_of(folder / "data.jsonl")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/nowhere"], "no folder"),
        (["{tmp}"], "no recording that can be used"),
        (["{tmp}", "--out=list.json"], ".jsonl"),
        (["{tmp}", "--pair={id}.wav"], "two different names"),
        (["{tmp}", "--pair={id}_a.wav,{id}_a.wav"], "two different names"),
        (["{tmp}", "--pair={id}_a.wav,{id}_b.wav"], "no file in"),
        (["{tmp}", "--join"], "--join goes with --pair"),
        (["{tmp}", "--pair={id}_a.wav,{id}_b.wav", "--joined_dir=x"], "goes with --join"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert call("data", "index", *[word.replace("{tmp}", str(tmp_path)) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("\nerror: ") and said.count("\n") == 2


def test_two_mono_files_are_listed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path / "talks")
    before = set(folder.iterdir())
    assert call("data", "index", folder, "--pair", PAIR) == 0
    assert lines_of(folder / "data.jsonl") == [
        {"path": f"{name}_left.wav", "user_path": f"{name}_right.wav", "duration": 5.0}
        for name in sorted(NAMES)
    ]
    assert set(folder.iterdir()) == before | {folder / "data.jsonl"}, "nothing else is written"
    assert "3 have no transcript (.json); moshi-ttt data annotate" in capsys.readouterr().out
    out = tmp_path / "lists/all.jsonl"
    assert call("data", "index", folder, "--pair", PAIR, "--out", out) == 0
    assert lines_of(out)[0]["user_path"] == str(folder / "eval_000_right.wav")


@pytest.mark.parametrize("pair", [None, PAIR])
def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path, pair: str | None) -> None:
    make = plain_folder if pair is None else mono_folder
    make(tmp_path / "elsewhere", ["train_000"])
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "talks")
    options = [] if pair is None else ["--pair", pair]
    assert call("data", "index", tmp_path / "talks", *options) == 0
    (line,) = lines_of(tmp_path / "talks/data.jsonl")
    assert line["path"].startswith("linked/train_000")


def test_two_mono_files_are_joined_sample_by_sample_with_their_texts(tmp_path: Path) -> None:
    folder = mono_folder(tmp_path)
    assert call("data", "index", folder, "--pair", PAIR, "--join") == 0
    lines = lines_of(folder / "data.jsonl")
    assert [line["path"] for line in lines] == sorted(f"stereo/{name}.wav" for name in NAMES)
    for name in NAMES:
        joined, rate = soundfile.read(folder / f"stereo/{name}.wav", dtype="int16")
        true, true_rate = soundfile.read(DIALOGUES / f"{name}.wav", dtype="int16")
        assert rate == true_rate and np.array_equal(joined, true)
        text = (folder / f"stereo/{name}.left.txt").read_text()
        assert text == (folder / f"{name}_left.txt").read_text()


def test_a_transcript_of_both_beside_the_first_file_keeps_its_speakers_when_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    words = ["data", "index", folder, "--pair", PAIR, "--join", "--overwrite"]
    of_both = (DIALOGUES / "train_000.json").read_text()
    (folder / "train_000_left.json").write_text(of_both)
    assert call(*words) == 0
    joined = folder / "stereo/train_000.json"
    said = json.loads(joined.read_text())["alignments"]
    assert said == sorted(json.loads(of_both)["alignments"], key=lambda entry: entry[1][0])

    (folder / "train_000_right.json").write_text(of_both)
    assert call(*words) == 1
    assert "holds words of SPEAKER_MAIN and of others, but both" in capsys.readouterr().out


def test_pairs_may_lie_in_folders_and_bring_transcripts(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, (2, 24_000))
    for channel, side in enumerate(["moshi", "user"]):
        (tmp_path / side).mkdir()
        soundfile.write(tmp_path / side / "a.wav", samples[channel], 24_000, subtype="FLOAT")
        content: dict[str, Any] = {
            "alignments": [[side, [0.1 + channel, 0.2 + channel], "SPEAKER_MAIN"]]
        }
        (tmp_path / side / "a.json").write_text(json.dumps(content))
    pattern = "moshi/{id}.wav,user/{id}.wav"
    assert call("data", "index", tmp_path, "--pair", pattern, "--join") == 0
    joined, _ = soundfile.read(tmp_path / "stereo/a.wav", dtype="float32")
    assert np.array_equal(joined, samples.T.astype(np.float32))
    assert json.loads((tmp_path / "stereo/a.json").read_text())["alignments"] == [
        ["moshi", [0.1, 0.2], "SPEAKER_MAIN"],
        ["user", [1.1, 1.2], "SPEAKER_USER"],
    ]


@pytest.mark.parametrize("step", ["_write_wav", "_carry_words"])
def test_a_pair_whose_joining_was_cut_off_is_joined_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    left, right = folder / "train_000_left.wav", folder / "train_000_right.wav"
    pair = pairs.Pair(left, right, folder / "stereo/train_000.wav", overwrite=False)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pairs, step, dies)
        with pytest.raises(KeyboardInterrupt):
            pairs.join(pair)
    pairs.join(pair)
    words = left.with_suffix(".txt").read_bytes()
    assert (folder / "stereo/train_000.left.txt").read_bytes() == words
    assert pair.joined.is_file()


def test_two_files_that_do_not_belong_together_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mono(name: str, num_samples: int, rate: int = 24_000) -> None:
        soundfile.write(tmp_path / f"{name}.wav", np.full(num_samples, 0.1), rate)

    mono("good_left", 24_000)
    mono("good_right", 24_100)  # 4 ms: filled with silence
    mono("length_left", 24_000)
    mono("length_right", 30_000)
    mono("rate_left", 24_000)
    mono("rate_right", 16_000, 16_000)
    mono("alone_left", 24_000)
    mono("both_right", 24_000)
    soundfile.write(tmp_path / "both_left.wav", np.full((24_000, 2), 0.1), 24_000)
    assert call("data", "index", tmp_path, "--pair", PAIR) == 0
    names = [line["path"] for line in lines_of(tmp_path / "data.jsonl")]
    assert names == ["good_left.wav", "rate_left.wav"], "each file is resampled by itself"
    said = " ".join(capsys.readouterr().out.split())
    assert "length_left.wav lasts 1.000 s, but" in said
    assert "alone_left.wav has no partner: there is no" in said
    assert "both_left.wav is made of 2 channels, not mono" in said

    assert call("data", "index", tmp_path, "--pair", PAIR, "--join", "--overwrite") == 0
    (line,) = lines_of(tmp_path / "data.jsonl")
    assert line["path"] == "stereo/good.wav"
    said = capsys.readouterr().out
    assert "length_left.wav lasts 1.000 s, but" in said
    assert "rate_left.wav has 24000 samples a second, but" in said


def test_a_joined_file_is_kept_until_its_parts_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    words = ["data", "index", folder, "--pair", PAIR, "--join"]
    assert call(*words) == 0
    joined = folder / "stereo/train_000.wav"
    made_at = joined.stat().st_mtime_ns
    (folder / "data.jsonl").unlink()
    assert call(*words) == 0
    assert joined.stat().st_mtime_ns == made_at
    (folder / "data.jsonl").unlink()
    soundfile.write(folder / "train_000_left.wav", np.zeros(120_000), 24_000)
    assert call(*words) == 1
    assert "older than train_000_left.wav" in capsys.readouterr().out
    assert call(*words, "--overwrite") == 0
    assert not soundfile.read(joined)[0][:, 0].any()


def test_a_joined_file_is_not_taken_for_one_of_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path / "mono", ["train_000"])
    joined = folder / "stereo/train_000.wav"
    joined.parent.mkdir()
    soundfile.write(joined, np.zeros((24_000, 2)), 24_000)
    turned = "{id}_right.wav,{id}_left.wav"

    def index(pair: str, *more: str) -> Any:
        (folder / "data.jsonl").unlink(missing_ok=True)
        return call("data", "index", folder, "--pair", pair, "--join", *more)

    assert index(PAIR) == 1, "somebody else's file"
    assert "was not joined from" in capsys.readouterr().out
    assert index(turned, "--overwrite") == 0
    assert index(PAIR) == 1, "the order was wrong, and is put right"
    assert "train_000_left.wav and" in capsys.readouterr().out
    assert index(PAIR, "--overwrite") == 0
    folder = folder.rename(tmp_path / "moved")
    assert index(PAIR) == 0


def test_words_that_come_later_are_carried_to_a_joined_file(tmp_path: Path) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    source, carried = folder / "train_000_left.json", folder / "stereo/train_000.json"
    words = ["data", "index", folder, "--pair", PAIR, "--join", "--out"]
    assert call(*words, folder / "1.jsonl") == 0 and not carried.exists()
    for number, word in enumerate(["hello", "hallo"], 2):
        source.write_text(json.dumps({"alignments": [[word, [0.1, 0.4], "SPEAKER_MAIN"]]}))
        assert call(*words, folder / f"{number}.jsonl") == 0
        assert json.loads(carried.read_text())["alignments"][0][0] == word
    carried.write_text("corrected by hand, and newer")
    assert call(*words, folder / "4.jsonl") == 0
    assert carried.read_text() == "corrected by hand, and newer"


def transcript(word: str) -> str:
    return json.dumps({"alignments": [[word, [0.1, 0.4], "SPEAKER_MAIN"]]})


def test_a_joined_transcript_that_was_corrected_is_never_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    source, carried = folder / "train_000_left.json", folder / "stereo/train_000.json"
    text, carried_text = folder / "train_000_left.txt", folder / "stereo/train_000.left.txt"
    source.write_text(transcript("hello"))
    words = ["data", "index", folder, "--join", "--overwrite", "--pair"]
    assert call(*words, PAIR) == 0
    carried.write_text(carried.read_text().replace("hello", "hallo"))
    carried_text.write_text("corrected")
    corrected = carried.read_bytes()
    capsys.readouterr()

    later = carried.stat().st_mtime_ns + 10**9
    for newer in (False, True):
        if newer:
            os.utime(source, ns=(later, later))
            text.write_text("also newer")
            os.utime(text, ns=(later, later))
        for again in (words, [*words[:-2], "--out", folder / f"{newer}.jsonl", "--pair"]):
            assert call(*again, PAIR) == 0
            assert carried.read_bytes() == corrected and carried_text.read_text() == "corrected"
            said = " ".join(capsys.readouterr().out.split())
            is_due = newer or again is words
            assert (f"{carried} stays, as it is not what was joined: move" in said) is is_due
            assert (f"{carried_text} stays, as it is" in said) is is_due

    # Of other files, as in the other order, the words are others.
    shutil.copy(source, folder / "train_000_right.json")
    for seconds, number in enumerate(("", "1"), 10):
        later += seconds * 10**9
        os.utime(folder / "train_000_left.wav", ns=(later, later))
        assert call(*words, PAIR) == 0
        aside = folder / f"stereo/train_000.json.before{number}"
        assert aside.read_bytes() == corrected
        assert f"what was there is {aside.name} now" in " ".join(capsys.readouterr().out.split())
        assert len(json.loads(carried.read_text())["alignments"]) == 2
        carried.write_bytes(corrected)
    assert (folder / "stereo/train_000.left.txt.before").read_text() == "corrected"
    assert carried_text.read_text() == "also newer"


def test_a_joined_transcript_that_nobody_has_changed_is_joined_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one of an earlier version, which has no mark; the mark itself is no finding."""
    folder = mono_folder(tmp_path, ["train_000"])
    source, carried = folder / "train_000_left.json", folder / "stereo/train_000.json"
    words = ["data", "index", folder, "--pair", PAIR, "--join", "--overwrite"]
    for word in ("hello", "hallo"):
        source.write_text(transcript(word))
        assert call(*words) == 0
        assert json.loads(carried.read_text())["alignments"] == [[word, [0.1, 0.4], "SPEAKER_MAIN"]]
    carried.write_text(transcript("hallo"))
    assert call(*words) == 0
    assert "somebody" not in capsys.readouterr().out
    assert sorted(path.suffix for path in carried.parent.iterdir()) == [
        ".json",
        ".txt",
        ".txt",
        ".wav",
    ]
    assert call(*words) == 0
    call("data", "check", folder / "data.jsonl", "--fast", "--workers=1")
    assert "not used" not in capsys.readouterr().out
