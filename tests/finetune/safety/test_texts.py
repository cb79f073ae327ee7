"""Every text that a user has written may be UTF-8 or UTF-16; of all others the remedy is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config import load_config
from finetune.data import Reading, StereoFile, read_transcript
from finetune.data.layouts import list_entries
from finetune.data.problems import FileProblem
from finetune.errors import UserError
from finetune.evaluation.tasks.pairs.score import read_pairs
from finetune.recordings.texts import read_texts
from finetune.recordings.work import RecordingError
from finetune.spoken.files import _read_answers


def _words(path: Path) -> Any:
    stereo = StereoFile(path.with_name("a.wav"), "a.wav", "", 1.0, Reading())
    return read_texts(stereo)


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "annotate": ("a.left.txt", "a caf\u00e9", _words),
    "list": (
        "a.jsonl",
        '{"path": "caf\u00e9.wav", "duration": 4.0}\n',
        lambda path: list_entries(path, "--data"),
    ),
    "transcript": (
        "a.json",
        json.dumps({"alignments": [["caf\u00e9", [0.1, 0.2], "A"]]}, ensure_ascii=False),
        read_transcript,
    ),
    "pairs": ("a.jsonl", '{"good": "caf\u00e9.wav", "bad": "b.wav"}\n', read_pairs),
    "configuration": (
        "a.yaml",
        "run_dir: caf\u00e9\ndata: {train_data: a.jsonl}\nlora: {enable: true}\n",
        load_config,
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "text", "read"), READERS.values(), ids=READERS)
def test_a_mark_says_the_encoding(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any], encoding: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    expected = read(path)
    path.write_text(text, encoding=encoding)
    assert read(path) == expected and "caf\u00e9" in str(expected)


@pytest.mark.parametrize(("name", "text", "read"), READERS.values(), ids=READERS)
def test_other_encodings_are_refused_with_the_remedy(
    tmp_path: Path, name: str, text: str, read: Callable[[Path], Any]
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises((UserError, RecordingError, FileProblem)) as raised:
        read(path)
    assert str(path) in str(raised.value) and "save it as UTF-8" in str(raised.value)


def test_answers_of_other_models_may_be_utf_16(tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text("", encoding="utf-16")
    assert _read_answers(tmp_path, "output", []) == []
