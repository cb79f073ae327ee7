"""Where `moshi-ttt generate` writes: over nothing that it reads."""

from pathlib import Path
from typing import Any

import pytest
from test_files import record

from finetune.errors import UserError
from finetune.serve import GenerateOptions
from finetune.serve.targets import Job, list_jobs


def test_answers_never_replace_recordings_or_one_another(tmp_path: Path) -> None:
    def jobs(**how: Any) -> list[Job]:
        return list_jobs(GenerateOptions(checkpoint=tmp_path, **how))

    for name in ("in/a.wav", "in/a.flac", "tree/x/input.wav"):
        record(tmp_path / name, 100)
    with pytest.raises(UserError, match=r"a\.flac and .*a\.wav would both be answered"):
        jobs(audio=tmp_path / "in", out=tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(UserError, match="holds the recordings themselves"):
        jobs(audio=tmp_path / "in", out=tmp_path / "link")
    with pytest.raises(UserError, match="is the recording itself"):
        jobs(audio=tmp_path / "in/a.wav", out=tmp_path / "link/a.wav")
    (tmp_path / "tree/y").mkdir()
    (tmp_path / "tree/y/input.wav").symlink_to(tmp_path / "tree/y/output.wav")
    record(tmp_path / "tree/y/output.wav", 100)
    with pytest.raises(UserError, match="is the recording itself"):
        jobs(input_dir=tmp_path / "tree")
    assert not (tmp_path / "out").exists()


def test_answers_never_replace_what_belongs_to_a_recording(tmp_path: Path) -> None:
    def jobs(**how: Any) -> list[Job]:
        return list_jobs(GenerateOptions(checkpoint=tmp_path, **how))

    for name in ("a.flac", "in/a.wav", "in/report.wav", "tree/input.flac"):
        record(tmp_path / name, 100)
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    (tmp_path / "a.json").touch()
    single = {"audio": tmp_path / "a.flac"}
    for out in ("a.wav", "link.wav"):
        with pytest.raises(UserError, match="would go, is the place of a recording"):
            jobs(**single, out=tmp_path / out)
    # There, no words are written.
    assert jobs(**single, out=tmp_path / "a.wav", prompt_sec=1.0)
    with pytest.raises(UserError, match="would go, is the place of a recording"):
        jobs(input_dir=tmp_path / "tree", input_name="input.flac", output_name="input.wav")
    for session in ("b.wav", "b.json", "a.flac", "a.json"):
        with pytest.raises(UserError, match=r"--session: .* is a recording, an answer or"):
            jobs(**single, out=tmp_path / "b.wav", session=tmp_path / session)
    with pytest.raises(UserError, match=r"--report: .*report\.json is a recording, an answer or"):
        jobs(audio=tmp_path / "in", out=tmp_path / "out", report=tmp_path / "out")
