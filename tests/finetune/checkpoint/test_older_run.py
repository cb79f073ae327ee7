"""An older run waits until the one in its place has a checkpoint, and is back if that fails."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import run_folder_tools
from run_folder_tools import OVERWRITE, tree
from training_tools import train, trainer

from finetune.checkpoint import list_checkpoints
from finetune.checkpoint.run_record import RunRecord
from finetune.errors import UserError

# Fixtures: pytest finds them by their names in this module.
finished = run_folder_tools.finished
run_dir = run_folder_tools.run_dir


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("monitoring.metrics._open_tensorboard", UserError("the disk is on fire"), "on fire"),
        ("trainer.write_summary", OSError(28, "disk full"), "run_dir: cannot write .*: disk full"),
    ],
)
def test_a_start_that_fails_late_puts_the_older_run_back_and_says_so(
    config: Path,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    error: Exception,
    message: str,
) -> None:
    def fail(*args: Any) -> None:
        raise error

    before = tree(run_dir)
    monkeypatch.setattr(f"finetune.{where}", fail)
    with pytest.raises(UserError, match=message):
        trainer(config, run_dir, OVERWRITE)
    assert tree(run_dir) == before
    assert "the earlier run is back in" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(config, run_dir, {"resume": True, "max_steps": 3}).step == 3


@pytest.mark.parametrize("is_disk_full", [False, True])
def test_what_a_failed_start_has_opened_is_closed_before_the_older_run_is_back(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, is_disk_full: bool
) -> None:
    """TensorBoard's writer has a thread that may write seconds later."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    was_older_aside: list[bool] = []
    close, add = EventFileWriter.close, RunRecord.add

    def watched(writer: EventFileWriter) -> None:
        was_older_aside.append((run_dir / ".replaced").exists())
        close(writer)

    def add_but_events(record: RunRecord, files: Iterable[str] = (), **trees: Any) -> None:
        files = list(files)
        if any(name.startswith("tb/") for name in files):
            raise OSError(28, "disk full")
        add(record, files, **trees)

    def fail(*args: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(EventFileWriter, "close", watched)
    if is_disk_full:
        monkeypatch.setattr(RunRecord, "add", add_but_events)
    else:
        monkeypatch.setattr("finetune.trainer.write_summary", fail)
    with pytest.raises(UserError, match=r"disk (is )?full"):
        trainer(config, run_dir, OVERWRITE)
    assert was_older_aside == [True]


@pytest.mark.parametrize("do_ckpt", [True, False])
def test_the_older_run_waits_for_a_checkpoint_or_the_end(
    config: Path, run_dir: Path, do_ckpt: bool
) -> None:
    before = tree(run_dir)
    overrides = OVERWRITE | {"max_steps": 3, "ckpt_freq": 2, "do_ckpt": do_ckpt}
    run = trainer(config, run_dir, overrides)
    aside = run_dir / ".replaced"
    assert tree(aside) == before
    seen: list[Any] = []
    step = type(run).train_step

    def watched() -> None:
        run.writer._join()
        seen.append(aside.exists())
        step(run)

    run.train_step = watched  # type: ignore[method-assign]
    assert run.train() == 0
    assert seen == ([True, True, False] if do_ckpt else [True, True, True])
    assert not aside.exists()
    assert len(list_checkpoints(run_dir)) == (2 if do_ckpt else 0)


@pytest.mark.parametrize("do_ckpt", [True, False])
def test_a_run_that_fails_before_its_first_checkpoint_gives_the_place_back(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, do_ckpt: bool
) -> None:
    before = tree(run_dir)
    run = trainer(config, run_dir, OVERWRITE | {"do_ckpt": do_ckpt, "max_steps": 5})

    def fail() -> None:
        raise UserError("no more data")

    monkeypatch.setattr(run, "next_batches", fail)
    with pytest.raises(UserError, match="no more data"):
        run.train()
    assert tree(run_dir) == before


def test_a_read_only_parent_and_a_folder_of_its_own_file_system(
    config: Path, run_dir: Path
) -> None:
    """Nothing is done beside the run folder."""
    parent = run_dir.parent
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "none", run_dir]).returncode == 0
        if not mounted:
            pytest.skip("cannot mount")
        try:
            train(config, run_dir, {"max_steps": 2})
            train(config, run_dir, OVERWRITE)
            assert len(list_checkpoints(run_dir)) == 1
        finally:
            subprocess.run(["umount", "--lazy", run_dir], check=True)
    parent.chmod(0o555)
    try:
        train(config, run_dir, OVERWRITE)
    finally:
        parent.chmod(0o755)
    assert len(list_checkpoints(run_dir)) == 1
    assert [path.name for path in parent.iterdir()] == ["run"]


def test_a_parent_that_nobody_can_write_to_and_a_run_folder_mounted_in_it(
    config: Path, tmp_path: Path
) -> None:
    """Not even root: a file system that is read-only, and another in it for the run alone."""
    parent, run_dir = tmp_path / "parent", tmp_path / "parent/run"
    parent.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", parent]).returncode:
        pytest.skip("only root can mount")
    try:
        run_dir.mkdir()
        (parent / "other").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", run_dir], check=True)
        subprocess.run(["mount", "-o", "remount,ro", parent], check=True)
        with pytest.raises(UserError, match="run_dir: cannot write to"):
            trainer(config, parent / "other")
        train(config, run_dir, {"max_steps": 2})
        before = tree(run_dir)
        with pytest.raises(UserError, match="moshi_path"):
            trainer(config, run_dir, OVERWRITE | {"moshi_paths.moshi_path": "nowhere"})
        assert tree(run_dir) == before
        train(config, run_dir, OVERWRITE)
        assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint_000001"]
    finally:
        for mount in (run_dir, parent):
            subprocess.run(["umount", "--lazy", mount])
