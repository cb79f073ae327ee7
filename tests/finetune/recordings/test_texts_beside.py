"""Texts and transcripts beside recordings that are not what they seem to be."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forked import COMMAND, Program
from recordings_tools import add, call, lines_of, mono_folder, plain_folder

from finetune.spoken.speech import Voice, synthesize

GERMAN = "Guten Morgen, wie geht es dir heute? Ich habe gestern mit meiner Schwester gegessen."
ENGLISH = "Good morning, how are you today? I had dinner with my sister in Zwickau yesterday."


def said_by(folder: Path, name: str, *texts: tuple[str, str]) -> None:
    """Write a recording, and a text beside it, in which these are said, on the left and right."""
    sides = [synthesize(text, Voice(voice)).samples for text, voice in texts]
    samples = np.zeros((max(map(len, sides)), 2))
    for channel, side in enumerate(sides):
        samples[: len(side), channel] = side
        file = folder / f"{name}.{('left', 'right')[channel]}.txt"
        file.write_text(texts[channel][0])
    soundfile.write(folder / f"{name}.wav", samples, 24_000)


def test_a_text_of_another_language_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An aligner finds places for the words of any."""
    said_by(tmp_path, "mixed", (GERMAN, "de"), (ENGLISH, "en-us"))
    said_by(tmp_path, "other", (ENGLISH, "en-us"), ("Guten Morgen", "de"))
    assert call("data", "index", tmp_path) == 0
    assert call("data", "annotate", tmp_path / "data.jsonl", "--workers=1") == 0
    said = capsys.readouterr().out
    assert "warning: many words are not in the English dictionary" in said
    assert "guessed, in 1:" in said and "mixed.wav, left channel: 9 of 14, such as 'Guten'" in said
    assert "other.wav" not in said, "of two words nothing can be told"
    # What the aligner was taught before is no English either.
    assert call("data", "annotate", tmp_path / "data.jsonl", "--workers=1", "--overwrite") == 0
    assert "mixed.wav, left channel: 9 of 14" in capsys.readouterr().out


def test_a_text_of_both_that_is_not_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plain_folder(tmp_path, ["train_000"])
    (folder / "train_000.txt").write_text("A: Something else.\n")
    assert call("data", "index", folder) == 0
    assert call("data", "annotate", folder / "data.jsonl") == 0
    said = capsys.readouterr().out
    assert "warning: 1 text is not read, as a text of a channel lies beside it" in said
    assert "(train_000.txt, for example)" in said


def remedy_of(folder: Path) -> str:
    """What `data check` says of a transcript that is missing."""
    out = folder / "found.json"
    assert call("data", "check", folder / "data.jsonl", "--json", out, "--workers=1") == 1
    (recording,) = json.loads(out.read_text())["recordings"]
    missing = (each for each in recording["findings"] if each["code"] == "transcript-missing")
    return str(next(missing)["remedy"])


def test_a_transcript_with_an_ending_in_capitals_is_named(tmp_path: Path) -> None:
    add(tmp_path, "a")
    (tmp_path / "a.json").rename(tmp_path / "a.JSON")
    assert remedy_of(tmp_path) == "rename a.JSON, which is there, to a.json"


def test_the_users_transcript_in_capitals_is_not_left_out_in_silence(tmp_path: Path) -> None:
    folder = mono_folder(tmp_path, ["train_000"])
    options = ["--pair", "{id}_left.wav,{id}_right.wav"]
    assert call("data", "index", folder, *options) == 0
    assert call("data", "annotate", folder / "data.jsonl") == 0
    shutil.copy(folder / "train_000_left.json", folder / "train_000_right.JSON")
    assert "rename train_000_right.JSON, which is there" in remedy_of(folder)


def test_the_commands_that_come_next_can_be_pasted(tmp_path: Path) -> None:
    def next_of(*words: str | Path) -> list[list[str]]:
        program = Program(COMMAND, *words)
        output, _ = program.communicate(timeout=60)
        assert program.returncode == 0, output
        marks = ("next: ", "then: ")
        lines = [line for line in output.splitlines() if line.startswith(marks)]
        return [shlex.split(line)[line.split().index("moshi-ttt") :] for line in lines]

    folder = plain_folder(tmp_path / "Anna's talks", ["train_000"])
    jsonl = str(folder / "data.jsonl")
    assert next_of("data", "index", folder) == [["moshi-ttt", "data", "annotate", jsonl]]
    assert next_of("data", "annotate", jsonl) == [["moshi-ttt", "data", "check", jsonl]]
    (again,) = next_of("data", "index", folder, "--overwrite")
    assert again == ["moshi-ttt", "data", "check", jsonl]
    assert lines_of(folder / "data.jsonl")

    made = tmp_path / "two words"
    check, train = next_of("demo-data", "--out", made, "--num_dialogues=4", "--max_sec=25")
    assert check == ["moshi-ttt", "data", "check", str(made / "train.jsonl")]
    assert f"--data.train_data={made / 'train.jsonl'}" in train
    talks = tmp_path / "a talk; or more"
    answer, score = next_of("recall-audio", talks, "--num_talks=1", "--distances_sec=10")
    assert answer[-1] == score[-1] == str(talks)
