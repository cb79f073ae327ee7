"""A run that is killed, or loses power, while it replaces another: one of the two is left whole."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folder_tools
from run_folder_tools import tree
from training_tools import finish, start_program, trainer

from finetune.checkpoint import list_checkpoints, manifest
from finetune.checkpoint.replacing import delete_replaced, set_aside, settle
from finetune.checkpoint.run_record import RunRecord
from finetune.errors import UserError

# Fixtures: pytest finds them by their names in this module.
finished = run_folder_tools.finished
run_dir = run_folder_tools.run_dir


# --- kills, and starts at once --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("at", ["step 1/", "loads"])
def test_a_killed_run_gives_the_place_back_at_the_next_start(
    config: Path, run_dir: Path, at: str
) -> None:
    before = tree(run_dir)
    after = "import runpy, sys\nfrom finetune.trainer import Trainer\n"
    if at == "loads":
        after += "import time\n"
        after += "Trainer.train = lambda self: (print('loads', flush=True), time.sleep(99))\n"
    options = (f"--config={config}", f"--run_dir={run_dir}", "--max_steps=100000")
    run = start_program(*options, "--overwrite_run_dir", after=after)
    assert run.stdout is not None
    for line in run.stdout:
        if at in line:
            break
    run.kill()
    finish(run)
    assert tree(run_dir / ".replaced") == before
    with pytest.raises(UserError, match="already holds a run"):
        trainer(config, run_dir)
    assert tree(run_dir) == before


LOADS_SLOWLY = """
import runpy, sys, time
import finetune.trainer as t
load = t.load_model
t.load_model = lambda *a, **k: (time.sleep(4), load(*a, **k))[1]
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["overwrite", "a new folder"])
def test_of_three_starts_exactly_one_goes_on(config: Path, run_dir: Path, there: bool) -> None:
    if not there:
        shutil.rmtree(run_dir)
    options = [f"--config={config}", f"--run_dir={run_dir}", "--max_steps=2"]
    options += ["--overwrite_run_dir"] if there else []
    runs = [start_program(*options, after=LOADS_SLOWLY) for _ in range(3)]
    results = [finish(run) for run in runs]
    assert sorted(status for status, _ in results) == [0, 1, 1], results
    assert sum("is in use by" in output for _, output in results) == 2
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint_000002"]


# --- power cuts -----------------------------------------------------------------------------------


OLD_FILES: dict[str, Any] = {
    "args.yaml": "old",
    "metrics.train.jsonl": "old",
    "tb/events.1": "old",
    "checkpoints/checkpoint_000001/info.json": "old",
    "checkpoints/checkpoint_000001/resume/x": "old",
}
FOREIGN: dict[str, Any] = {
    "notes.txt": "mine",
    "tb/notes.txt": "mine",
    "checkpoints/notes.txt": "mine",
}
NEW_FILES: dict[str, Any] = {"args.yaml": "new", "metrics.train.jsonl": "new", "tb/events.2": "new"}
NEW_CHECKPOINT: dict[str, Any] = {"info.json": "new", "resume/x": "new"}


def fill(folder: Path, files: dict[str, Any]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def older_run(folder: Path) -> Path:
    folder.mkdir()
    record = RunRecord(folder)
    record.create()
    names = [*OLD_FILES, "checkpoints/checkpoint_000001/manifest.json"]
    record.add(names)
    fill(folder, OLD_FILES | FOREIGN)
    saved = folder / "checkpoints/checkpoint_000001"
    manifest.write(saved, manifest.describe(saved, [p for p in saved.rglob("*") if p.is_file()]))
    return folder


def newer_run(folder: Path) -> None:
    set_aside(folder, RunRecord(folder).found())
    RunRecord(folder).add(NEW_FILES)
    fill(folder, NEW_FILES)


def a_start_that_fails(folder: Path) -> None:
    newer_run(folder)
    settle(folder)


def a_run_with_a_checkpoint(folder: Path) -> None:
    newer_run(folder)
    record = RunRecord(folder)
    partial = folder / "checkpoints/checkpoint_000002.incomplete"
    record.add(trees=["checkpoints/checkpoint_000002.incomplete"])
    fill(partial, NEW_CHECKPOINT)
    files = [p for p in partial.rglob("*") if p.is_file()]
    manifest.write(partial, manifest.describe(partial, files))
    record.add(f"checkpoints/checkpoint_000002/{name}" for name in
               (*NEW_CHECKPOINT, "manifest.json"))  # fmt: skip
    os.replace(partial, folder / "checkpoints/checkpoint_000002")
    delete_replaced(folder)


class PowerCut(BaseException):
    """Nothing in the exchange clears up behind it, as nothing would if the process died."""


class Power:
    """Counts the system calls that change something, and ends before a given one."""

    def __init__(self) -> None:
        self.count = 0
        self.number: int | None = None
        self.last: tuple[str, bool] | None = None
        sys.addaudithook(self._heard)  # for the rest of this process

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.number is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                return
            what = (str(path), bool(flags & os.O_APPEND))
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            what = (str(arguments[0]), False)
        else:
            return
        self.count += 1
        if self.count == self.number:
            self.number = None
            raise PowerCut
        self.last = what

    def cut_before(
        self, number: int, folder: Path, exchange: Callable[[Path], None], *, torn: bool = False
    ) -> bool:
        """Whether `exchange` got as far as its system call `number`.

        Args:
            torn: of what was appended last, only a part has reached the disk.
        """
        self.count, self.last, self.number = 0, None, number
        try:
            exchange(folder)
        except PowerCut:
            if torn and self.last is not None and self.last[1]:
                os.truncate(self.last[0], os.path.getsize(self.last[0]) - 5)
            return True
        finally:
            self.number = None
        return False


POWER = Power()


@pytest.mark.parametrize("torn", [False, True], ids=["", "torn"])
@pytest.mark.parametrize("exchange", [a_start_that_fails, a_run_with_a_checkpoint])
def test_a_power_cut_between_any_two_system_calls_leaves_one_run_whole(
    tmp_path: Path, exchange: Callable[[Path], None], torn: bool
) -> None:
    old = tree(older_run(tmp_path / "old"))
    whole = tmp_path / "whole"
    older_run(whole)
    exchange(whole)
    new = tree(whole)
    assert (new == old) == (exchange is a_start_that_fails)
    found: list[Any] = []
    for number in range(1, 200):
        folder = older_run(tmp_path / f"cut_{number}")
        if not POWER.cut_before(number, folder, exchange, torn=torn):
            break
        settle(folder)
        after = tree(folder)
        for leftover in [n for n in after if n.startswith(".replaced") and after[n] is None]:
            del after[leftover]  # an empty folder
        assert after in (old, new), (number, sorted(after))
        found.append(after == new)
    assert number > 25
    assert found == sorted(found), "once it is the new run, it stays so"
    assert found[-1] == (exchange is a_run_with_a_checkpoint) or old == new


def test_power_cuts_while_the_older_run_is_put_back(tmp_path: Path) -> None:
    """The next start is cut off as well, and the next."""
    old = tree(older_run(tmp_path / "old"))
    for number in (8, 16, 22):
        for first in range(1, 30, 4):
            again = first
            folder = older_run(tmp_path / f"{number}_{first}")
            POWER.cut_before(number, folder, newer_run)
            while POWER.cut_before(again, folder, settle):
                again += 3
            settle(folder)
            assert tree(folder) == old
