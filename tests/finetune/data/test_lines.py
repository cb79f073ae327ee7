"""A line of JSON that is wrong is told what exactly is wrong with it."""

from pathlib import Path

import pytest

from finetune.data import Reading, parse_line
from finetune.data.layouts.jsonl import JsonlSource
from finetune.errors import UserError
from finetune.evaluation.tasks.pairs.score import read_pairs


def test_what_is_not_asked_for_is_kept() -> None:
    assert parse_line('{"a": 1, "b": null, "c": []}', {"a": "a number"}, {"b": "text"}) == {
        "a": 1,
        "b": None,
        "c": [],
    }


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"path": "a.wav"}', "`duration` is missing"),
        ('{"paht": "a.wav", "duration": 2}', "unknown key `paht`, did you mean `path`?"),
        ('{"Path": "a.wav", "duration": 2}', "unknown key `Path`, did you mean `path`?"),
        ("{}", "`path` is missing, `duration` is missing"),
        ('{"path": "a.wav" "duration": 2}', "not JSON, column 18: Expecting ',' delimiter"),
        ('["a.wav", 2.0]', '["a.wav", 2.0] is no object in braces'),
        ('{"path": "a.wav", "duration": "2"}', '`duration` is "2", and must be a number'),
        ('{"path": "a.wav", "duration": true}', "`duration` is true, and must be a number"),
        ('{"path": null, "duration": 2}', "`path` is null, and must be text"),
        ('{"path": "a", "duration": 2, "user_path": 3}', "`user_path` is 3, and must be text"),
        ('{"path": "a", "duration": ' + "[" * 10**5, "it nests too deep"),
    ],
)
def test_a_line_of_a_list_is_told_what_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    (entry,) = JsonlSource(path, "--data", Reading()).entries()
    assert entry.recording is None
    assert entry.problem == (
        f'malformed line: {wrong}: expected {{"path": "a.wav", "duration": 12.3}} (seconds)'
    )


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"good": "a.wav"}', "`bad` is missing"),
        ('{"godo": "a.wav", "bad": "b.wav"}', "unknown key `godo`, did you mean `good`?"),
        ('{"good": "a.wav", "bad": 1}', "`bad` is 1, and must be text"),
        ("good bad", "not JSON, column 1: Expecting value"),
    ],
)
def test_a_line_of_pairs_is_told_what_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_pairs(path)
    assert str(raised.value).startswith(f"{path}:1: malformed line: {wrong}: expected ")
