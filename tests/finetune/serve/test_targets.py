"""Where `moshi-ttt generate` writes: over nothing that it reads."""

from dataclasses import replace
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
        for prompt_sec in (0.0, 1.0):
            with pytest.raises(UserError, match="would go, is the place of a recording"):
                jobs(**single, out=tmp_path / out, prompt_sec=prompt_sec)
    with pytest.raises(UserError, match="would go, is the place of a recording"):
        jobs(input_dir=tmp_path / "tree", input_name="input.flac", output_name="input.wav")
    for session in ("b.wav", "b.json", "a.flac", "a.json"):
        with pytest.raises(UserError, match=r"--session: .* is a recording, an answer or"):
            jobs(**single, out=tmp_path / "b.wav", session=tmp_path / session)
    with pytest.raises(UserError, match=r"--report: .*report\.json is a recording, an answer or"):
        jobs(audio=tmp_path / "in", out=tmp_path / "out", report=tmp_path / "out")


def test_answers_that_are_there_are_replaced_only_when_asked(tmp_path: Path) -> None:
    def jobs(**how: Any) -> list[Job]:
        return list_jobs(GenerateOptions(checkpoint=tmp_path, **how))

    for name in ("a.wav", "in/b.wav", "in/c.wav", "tree/x/input.wav", "tree/x/output.wav"):
        record(tmp_path / name, 100)
    (tmp_path / "out").mkdir()
    for name in ("x.wav", "y.json", "out/b.wav", "out/c.wav"):
        (tmp_path / name).touch()
    one, several = {"audio": tmp_path / "a.wav"}, {"audio": tmp_path / "in"}
    asks = r"is there already\. Give another --out, or --overwrite"
    or_rest = asks.replace(", or", ", --missing to answer the others alone, or")
    for how, named in (
        ({**one, "out": tmp_path / "x.wav"}, rf"{tmp_path}/x\.wav {asks}"),
        ({**one, "out": tmp_path / "y.wav"}, rf"{tmp_path}/y\.json {asks}"),
        ({**one, "out": tmp_path / "y.wav", "prompt_sec": 1.0}, rf"{tmp_path}/y\.json {asks}"),
        ({**several, "out": tmp_path / "out"}, rf"out/b\.wav \(and 1 more\) {or_rest}"),
        ({"input_dir": tmp_path / "tree"}, r"output\.wav is there .* another --output_name, or"),
    ):
        with pytest.raises(UserError, match=named):
            jobs(**how)
        assert jobs(**how, overwrite=True)


def test_recordings_of_a_folder_are_found_at_any_depth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audio = tmp_path / "in"
    for name in ("a.wav", "deep/er/a.wav", "deep/b.FLAC", "._a.wav"):
        record(audio / name, 100)
    out = tmp_path / "answers"
    jobs = list_jobs(GenerateOptions(checkpoint=tmp_path, audio=audio, out=out))
    assert jobs == [
        Job(audio / "a.wav", out / "a.wav"),
        Job(audio / "deep/b.FLAC", out / "deep/b.wav"),
        Job(audio / "deep/er/a.wav", out / "deep/er/a.wav"),
    ]
    assert (out / "deep/er").is_dir() and not (out / "deep/er/a.wav").exists()
    assert "passed over 1 hidden file, as" in caplog.text
    above = list_jobs(GenerateOptions(checkpoint=tmp_path, audio=audio / "deep", out=tmp_path))
    assert [job.target for job in above] == [tmp_path / "b.wav", tmp_path / "er/a.wav"]


def test_no_answer_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers among the recordings would be recordings of the next call."""
    record(tmp_path / "in/a.wav", 100)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    for audio, out, named in (
        (tmp_path / "in", tmp_path / "in/one", f"{tmp_path}/in/one"),
        (tmp_path / "in", tmp_path / "link/deep/er", f"{tmp_path}/link/deep/er"),
        (Path("."), None, "output"),  # where answers go if nothing is said
    ):
        with pytest.raises(UserError, match=f"--out: {named} lies in --audio: .* outside"):
            list_jobs(GenerateOptions(checkpoint=tmp_path, audio=audio, out=out))
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.wav"]


def test_what_is_missing_is_answered_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("in/a.wav", "in/deep/b.wav", "in/c.wav", "tree/x/input.wav", "tree/y/input.wav"):
        record(tmp_path / name, 100)
    (tmp_path / "out").mkdir()
    # Of one whose sound found no room, there are the words.
    for name in ("out/a.wav", "out/a.json", "out/c.json", "tree/y/output.wav"):
        (tmp_path / name).touch()
    folder = GenerateOptions(checkpoint=tmp_path, audio=tmp_path / "in", out=tmp_path / "out")
    with pytest.raises(UserError, match="--missing to answer the others alone"):
        list_jobs(folder)
    caplog.set_level("INFO")
    wanted = [tmp_path / "out/c.wav", tmp_path / "out/deep/b.wav"]
    assert [job.target for job in list_jobs(replace(folder, missing=True))] == wanted
    assert "1 of 3 recordings has an answer already" in caplog.text
    tree = GenerateOptions(checkpoint=tmp_path, input_dir=tmp_path / "tree", missing=True)
    assert [job.target for job in list_jobs(tree)] == [tmp_path / "tree/x/output.wav"]
