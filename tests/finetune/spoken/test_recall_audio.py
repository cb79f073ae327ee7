"""`moshi-ttt recall-audio` and `recall-score`: talks as files, and scores of the answers."""

import json
import re
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.__main__ import main

Said = Callable[..., tuple[Any, str]]
WORDS = ["--num_talks=2", "--distances_sec=10", "--num_facts=2", "--answer_sec=2", "--seed=3"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """A command in this process; its exit status, and what it says."""

    def run(*words: Any) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["moshi-ttt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def metas(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("*/meta.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def test_talks_are_written_the_same_on_every_run_and_never_over_others(
    call: Said, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    status, said = call("recall-audio", one, *WORDS)
    assert status == 0 and f"--input_dir {one}" in said
    written = contents(one)
    assert {*written} == {"recall_audio.json"} | {
        f"{id}/{name}" for id in ("000", "001") for name in ("input.wav", "meta.json")
    }
    for id, meta in metas(one).items():
        with wave.open(str(one / id / "input.wav"), "rb") as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
            audio = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert len(audio) == round(meta["duration_sec"] * 24_000)
        (question,) = meta["questions"]
        kind = "place" if id == "001" else "thing"
        assert (meta["id"], question["kind"], question["distance_sec"]) == (id, kind, 10.0)
        assert question["name"] in question["question"] and question["name"] in question["fact"]
        assert question["fact"].endswith(f" {question['answer']}.")
        assert question["answer"] in question["told_values"] and len(question["told_values"]) == 2
        # Loud where it is asked, silent where it is answered.
        asked, window = (
            audio[slice(*(round(t * 24_000) for t in question[key]))]
            for key in ("asked_sec", "window_sec")
        )
        assert np.abs(asked).mean() > 300 and not np.abs(window[2400:]).max()
        by_role = {u["role"]: u for u in meta["utterances"]}
        assert by_role["question"] == {
            "role": "question",
            "text": question["question"],
            "sec": question["asked_sec"],
        }

    # It goes on where it was stopped, to the same bytes.
    status, said = call("recall-audio", one, *WORDS)
    assert status == 0 and "2 of them were there already" in said
    (one / "001/meta.json").unlink()
    (one / "001/input.wav").write_bytes(b"half of it")
    assert call("recall-audio", one, *WORDS)[0] == 0
    assert call("recall-audio", other, *WORDS)[0] == 0
    assert contents(one) == contents(other) == written

    # Other talks, other people's folders, and what has been altered are left alone.
    status, said = call("recall-audio", one, *WORDS[:-1], "--seed=4")
    assert status == 1 and "holds other talks (seed was 3, is 4)" in said
    (one / "001/input.wav").write_bytes(b"another recording")
    status, said = call("recall-audio", one, *WORDS)
    assert status == 1 and "not what" in said and "001/meta.json" in said
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.tex").write_text("years of work")
    status, said = call("recall-audio", tmp_path / "thesis", *WORDS)
    assert status == 1 and "it is not a folder of talks" in said
    assert {*contents(tmp_path / "thesis")} == {"a.tex"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four talks of two questions, without the audio, which no score needs."""
    from finetune.spoken import TalkOptions, make_talk
    from finetune.spoken.answers import question_json
    from finetune.spoken.files import FORMAT

    folder = tmp_path_factory.mktemp("talks")
    for index in range(4):
        talk = make_talk(TalkOptions(distances_sec=(10.0, 25.0)), index, seed=0)
        questions = [question_json(talk, question) for question in talk.questions]
        (folder / f"{index:03d}").mkdir()
        meta = {"format": FORMAT, "questions": questions}
        (folder / f"{index:03d}/meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def talks(made: Path, tmp_path: Path) -> Path:
    for id, meta in metas(made).items():
        (tmp_path / "talks" / id).mkdir(parents=True)
        (tmp_path / "talks" / id / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "talks"


def test_answers_are_scored_from_timed_words_and_from_lines(
    call: Said, talks: Path, tmp_path: Path
) -> None:
    """Right at 10 s, and at 25 s another fact's value, nothing, the right one too late, right."""
    for number, (id, meta) in enumerate(metas(talks).items()):
        first, second = meta["questions"]
        wrong = next(v for v in second["told_values"] if v != second["answer"])
        if number == 0:
            (talks / id / "output.txt").write_text(f"{first['answer']}\nThat is {wrong}.\n")
            continue
        words = [[f"{first['answer']}.", [first["window_sec"][0] + 0.5] * 2, "SPEAKER_MAIN"]]
        if number > 1:
            at = second["window_sec"][0] + (5 if number == 2 else 1)
            words.append([second["answer"], [at, at + 0.3], "SPEAKER_MAIN"])
        (talks / id / "output.json").write_text(json.dumps({"alignments": words}))
    status, said = call("recall-score", talks, f"--out={tmp_path / 'scores.json'}")
    assert status == 0
    assert re.search(r"^\| 10 s \| 1\.00 \[0\.51, 1\.00\] \|", said, re.MULTILINE)
    assert re.search(r"^\| 25 s \| 0\.25 \[0\.05, 0\.70\] \|", said, re.MULTILINE)
    assert "| the model | 5 (62%) | 1 (12%) | 0 (0%) | 2 (25%) |" in said
    assert "Any value of the kind is right in 0.08 of the answers" in said
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["arms"]["model"]["all"]["value"] == 5 / 8
    assert [a["outcome"] for a in scores["answers"]["000"]] == ["right", "told"]
    assert [a["outcome"] for a in scores["answers"]["002"]] == ["right", "none"]


def test_what_cannot_be_scored_is_named(call: Said, talks: Path, tmp_path: Path) -> None:
    assert "has no talks (*/meta.json)" in call("recall-score", tmp_path)[1]
    status, said = call("recall-score", talks)
    assert status == 1 and "neither output.json nor output.txt" in said
    (talks / "001/heard.txt").write_text("one line\n")
    status, said = call("recall-score", talks, "--answers=heard")
    assert status == 1 and "001/heard.txt has 1 lines, and the talk 2 questions" in said
    (talks / "001/heard.txt").write_text("Munich\n\n")
    status, said = call("recall-score", talks, "--answers=heard")
    assert status == 0 and "3 of 4 talks have no answers: 000, 002, 003" in said
    (talks / "001/output.json").write_text('{"words": []}')
    status, said = call("recall-score", talks)
    assert status == 1 and 'has no list "alignments"' in said
    (talks / "001/meta.json").write_text('{"format": 2, "questions": [{"kind": "thing"}]}')
    assert "001/meta.json has questions that lack" in call("recall-score", talks)[1]
    (talks / "001/meta.json").write_text('{"format": 0}')
    assert "of another version (format 0, not 2)" in call("recall-score", talks)[1]
