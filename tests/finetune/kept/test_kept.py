"""What is done is kept as a whole, and read again as it was."""

import math
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.kept import Kept, Records, read_records


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new/result.json")
    assert kept.read() is None
    kept.write({"loss": math.inf, "name": "é", "curve": [1.5, math.nan]})
    found = kept.read()
    assert found is not None
    assert found["loss"] == math.inf and found["name"] == "é"
    assert found["curve"][0] == 1.5 and math.isnan(found["curve"][1])


def test_a_crash_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path / "result.json")
    kept.write({"step": 1})

    def dies(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        kept.write({"step": 2})
    assert kept.read() == {"step": 1}


def test_what_is_removed_is_not_kept_any_more(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "result.json")
    kept.remove()
    kept.write({"step": 1})
    kept.remove()
    assert kept.read() is None
    kept.path.mkdir()
    with pytest.raises(UserError, match=r"result\.json cannot be removed: "):
        kept.remove()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json is damaged .*: delete it, or move it away"):
        Kept(tmp_path / "result.json").read()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file/result\.json cannot be written: "):
        Kept(tmp_path / "file/result.json").write({})
    (tmp_path / "result.json").mkdir()
    with pytest.raises(UserError, match=r"result\.json cannot be read: "):
        Kept(tmp_path / "result.json").read()
    records = Records(tmp_path / "records.jsonl", {})
    records.path.unlink()
    records.path.mkdir()
    with pytest.raises(UserError, match=r"--out: cannot write .*records\.jsonl: "):
        records.append({"loss": 1.0})


def test_records_are_read_by_others_with_what_they_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, {"seed": 0}).append({"loss": math.nan})
    found = read_records(path, "--with")
    assert found is not None
    header, (record,) = found
    assert header == {"seed": 0} and math.isnan(record["loss"])
    assert read_records(tmp_path / "none.jsonl", "--with") is None
    path.write_text("{}\n[]\n")
    with pytest.raises(UserError, match=r"--with: .*records\.jsonl is damaged"):
        read_records(path, "--with")


def test_records_replace_no_file_of_somebody_else(tmp_path: Path) -> None:
    """Also one whose only line does not end; one of ours may have been cut off in its first."""
    path = tmp_path / "position.jsonl"
    for mine, told in (
        ('{"mine": 1}', "holds results of another"),
        ("mine", "is damaged"),
        ('{"fingerprints": 1', "is damaged"),
    ):
        path.write_text(mine)
        with pytest.raises(UserError, match=told):
            Records(path, {"a": 1})
        assert path.read_text() == mine
    for cut_off in ("", '{"fing', '{"fingerprint": {"a'):
        path.write_text(cut_off)
        assert not list(Records(path, {"a": 1}))
        assert path.read_text() == '{"fingerprint": {"a": 1}}\n'
