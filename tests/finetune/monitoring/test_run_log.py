"""What a run says is in its folder as well."""

import logging
from pathlib import Path

import pytest
from full_disk import room_for
from training_tools import train, trainer

from finetune.errors import UserError
from finetune.monitoring.run_log import RunLog


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "log.train.txt").read_text(encoding="utf-8").splitlines()


def test_a_run_keeps_all_that_it_says_and_a_resumed_one_goes_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", {"max_steps": 2})
    said = [line for line in capsys.readouterr().out.splitlines() if line[2:3] == ":"]
    first = lines_of(tmp_path / "run")
    # From its first line on, with the day before the time.
    assert [line[11:] for line in first if line[4:5] == "-"] == said
    assert "data: " in first[1] and "saved" in first[-1]

    train(config, tmp_path / "run", {"max_steps": 3, "resume": True})
    assert lines_of(tmp_path / "run")[: len(first)] == first
    assert any("resuming" in line for line in lines_of(tmp_path / "run")[len(first) :])
    train(config, tmp_path / "run", {"max_steps": 2, "overwrite_run_dir": True})
    assert not any("resuming" in line for line in lines_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("the disk is on fire."), "error: the disk is on fire."),
        (KeyError("x"), "KeyError"),
    ],
)
def test_the_error_that_ends_a_run_is_its_last_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, last: str
) -> None:
    run = trainer(config, tmp_path / "run")

    def fail() -> None:
        raise error

    monkeypatch.setattr(run, "train_step", fail)
    with pytest.raises(type(error)):
        run.train()
    assert lines_of(tmp_path / "run")[-1].startswith(last)
    assert not any(isinstance(handler, RunLog) for handler in logging.getLogger().handlers)


def test_a_start_that_fails_leaves_the_log_of_the_run_before(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", {"max_steps": 1})
    before = lines_of(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        trainer(config, tmp_path / "run")
    assert lines_of(tmp_path / "run") == before


def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    log, speaker = RunLog(enabled=True), logging.getLogger("finetune.test")
    speaker.setLevel("INFO")
    speaker.info("early")
    log.open(tmp_path, is_new=True)
    with room_for(100):
        for number in range(20):
            speaker.info("line %d", number)
        assert "line 19" not in (tmp_path / "log.train.txt").read_text()
    speaker.info("after")
    log.end(None)
    said = [line[20:] for line in lines_of(tmp_path) if line.split()[-1].isdigit()]
    assert said == [f"line {number}" for number in range(20)]
    assert lines_of(tmp_path)[0].endswith("early") and "after" in lines_of(tmp_path)[-2]


def test_no_line_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is not UTF-8, and a message that does not fit its arguments."""
    log = RunLog(enabled=True)

    def say(text: str, *args: object) -> None:  # to this handler alone: pytest's are less robust
        log.handle(logging.LogRecord("a library", logging.INFO, "", 0, text, args, None))

    say("gone%s.wav", "\udce9")
    log.open(tmp_path, is_new=True)
    say("again%s.wav", "\udce9")
    say("%d", "a library's mistake")
    say("goes on")
    log.end(None)
    said = [line[20:] for line in lines_of(tmp_path)]
    assert said == [r"gone\udce9.wav", r"again\udce9.wav", "goes on"]
    assert "Logging error" in capsys.readouterr().err
