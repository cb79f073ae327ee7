"""One run in the place of another: nothing that no run wrote is touched, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_tools import checkpoint, finish, start_program, train, trainer

from finetune.checkpoint import list_checkpoints, manifest
from finetune.checkpoint.replacing import delete_replaced, set_aside, settle
from finetune.checkpoint.run_record import NAME, RunRecord
from finetune.cli import run
from finetune.cli import train as train_command
from finetune.errors import UserError

OVERWRITE: dict[str, Any] = {"overwrite_run_dir": True, "max_steps": 1}
OWN = (NAME, ".lock")


def tree(folder: Path, *, without: Any = OWN) -> dict[str, Any]:
    """All that lies in a folder: contents of files, targets of links, None for folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name not in without:
            what = os.readlink(path) if path.is_symlink() else None
            found[name] = path.read_bytes() if path.is_file() and what is None else what
    return found


# --- what is never touched ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(config, run_dir, {"max_steps": 2, "ckpt_freq": 1})
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def test_what_no_run_wrote_stays_and_the_rest_is_replaced(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine: dict[str, Any] = {
        "notes.txt": "mine",
        "data/a.txt": "mine",
        "tb/b.txt": "mine",
        "checkpoints/c": "mine",
    }
    for name, text in mine.items():
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text(text)
    (run_dir / "empty").mkdir()
    elsewhere = run_dir.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("mine")
    (run_dir / "link").symlink_to(elsewhere)
    before = tree(run_dir)
    train(config, run_dir, OVERWRITE)
    after = tree(run_dir)
    assert {name: (run_dir / name).read_text() for name in mine} == mine
    assert (run_dir / "empty").is_dir() and (run_dir / "link").is_symlink()
    assert (elsewhere / "d.txt").read_text() == "mine"
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint_000001"]
    foreign = {*mine, "data", "empty", "link"}
    assert not {n for n in before if n.startswith("tb/events")} & after.keys()
    assert [n for n in after if n not in foreign and n.split("/")[0] not in
            ("args.yaml", "metrics.train.jsonl", "metrics.eval.jsonl", "tb", "checkpoints",
             "summary.json")] == []  # fmt: skip
    assert "left where it is" in capsys.readouterr().out


def _args_is_a_link(run_dir: Path) -> None:
    (run_dir / "args.yaml").rename(run_dir.parent / "args.yaml")
    (run_dir / "args.yaml").symlink_to(run_dir.parent / "args.yaml")


def _checkpoints_are_a_link(run_dir: Path) -> None:
    (run_dir / "checkpoints").rename(run_dir.parent / "far")
    (run_dir / "checkpoints").symlink_to(run_dir.parent / "far")


def _a_checkpoint_is_a_link(run_dir: Path) -> None:
    checkpoint(run_dir, 2).rename(run_dir.parent / "far")
    checkpoint(run_dir, 2).symlink_to(run_dir.parent / "far")


def _curves_are_a_link(run_dir: Path) -> None:
    (run_dir / "tb").rename(run_dir.parent / "far")
    (run_dir / "tb").symlink_to("../far")


def _a_file_in_a_checkpoint(run_dir: Path) -> None:
    (checkpoint(run_dir, 2) / "thesis.txt").write_text("years of work")


def _a_checkpoint_of_somebody_else(run_dir: Path) -> None:
    shutil.copytree(checkpoint(run_dir, 2), checkpoint(run_dir, 7))


def _no_record(run_dir: Path) -> None:
    (run_dir / NAME).unlink()


def _a_record_that_is_none(run_dir: Path) -> None:
    (run_dir / NAME).write_text('{"files": ["args.yaml"]}\n')


def _a_record_behind_a_link(run_dir: Path) -> None:
    (run_dir / NAME).rename(run_dir.parent / "record")
    (run_dir / NAME).symlink_to(run_dir.parent / "record")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_args_is_a_link, "args.yaml was not written by the run"),
        (_checkpoints_are_a_link, "checkpoints was not written by the run"),
        (_a_checkpoint_is_a_link, "checkpoint_000002 was not written by the run"),
        (_curves_are_a_link, "tb was not written by the run"),
        (_a_file_in_a_checkpoint, "thesis.txt was not written by the run"),
        (_a_checkpoint_of_somebody_else, "checkpoint_000007.* was not written by the run"),
        (_no_record, "no record of a run"),
        (_a_record_that_is_none, "no record of a run"),
        (_a_record_behind_a_link, "no record of a run"),
    ],
)
def test_what_is_not_replaced_stays_as_it_is(
    config: Path, run_dir: Path, change: Callable[[Path], None], named: str
) -> None:
    change(run_dir)
    before = tree(run_dir.parent)
    with pytest.raises(UserError, match=f"run_dir: .*{named}"):
        trainer(config, run_dir, OVERWRITE)
    assert tree(run_dir.parent) == before


@pytest.mark.parametrize("where", ["data", "evaluation", "model", "init_from", "cache", "yaml"])
def test_a_folder_with_what_the_run_reads_is_not_replaced(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    overrides = dict(OVERWRITE)
    if where in ("data", "evaluation"):
        shutil.copytree(config.parent / "train", run_dir / "data")
        key = "data.train_data" if where == "data" else "data.eval_data"
        overrides |= {key: run_dir / "data/all.jsonl", "do_eval": True}
    elif where == "model":
        shutil.copytree(config.parent / "model", run_dir / "model")
        overrides["moshi_paths.hf_repo_id"] = run_dir / "model"
    elif where == "init_from":
        overrides["moshi_paths.init_from"] = checkpoint(run_dir, 2)
    elif where == "cache":
        overrides["data.cache_dir"] = run_dir / "codes"
    before = tree(run_dir)
    yaml_file = run_dir / "args.yaml" if where == "yaml" else config
    arguments = {key: str(value) for key, value in (overrides | {"run_dir": run_dir}).items()}
    assert run(lambda: train_command(str(yaml_file), **arguments)) == 1
    assert "which would be overwritten" in capsys.readouterr().err
    assert tree(run_dir) == before


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_the_folder_one_stands_in_is_not_replaced(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    monkeypatch.chdir(run_dir / inner)
    before = tree(run_dir)
    with pytest.raises(UserError, match="the folder that this was started in, or holds it"):
        trainer(config, Path("." if not inner else ".."), OVERWRITE)
    assert tree(run_dir) == before


def test_nothing_is_replaced_through_a_link(config: Path, run_dir: Path) -> None:
    link = run_dir.parent / "latest"
    link.symlink_to(run_dir)
    before = tree(run_dir)
    with pytest.raises(UserError, match="is a symbolic link to"):
        trainer(config, link, OVERWRITE)
    assert tree(run_dir) == before
    above = run_dir.parent / "above"  # a folder further up may well be one
    above.symlink_to(run_dir.parent)
    train(config, above / "run", OVERWRITE)


def test_a_file_that_has_another_name_elsewhere_stays_there(config: Path, run_dir: Path) -> None:
    """A hard link: some keep the best checkpoint so."""
    file = checkpoint(run_dir, 2) / "info.json"
    kept = run_dir.parent / "kept.json"
    kept.hardlink_to(file)
    before = kept.read_bytes()
    train(config, run_dir, OVERWRITE)
    assert kept.read_bytes() == before and not file.exists()


@pytest.mark.parametrize("target", ["nowhere", "run2"], ids=["nothing", "itself"])
def test_a_link_that_leads_nowhere_is_no_run_folder(
    config: Path, run_dir: Path, target: str
) -> None:
    link = run_dir.parent / "run2"
    link.symlink_to(target)
    with pytest.raises(UserError, match="run_dir: "):
        trainer(config, link, OVERWRITE)
    assert os.readlink(link) == target and not (run_dir.parent / "nowhere").exists()


def test_a_users_project_is_not_written_into(config: Path, tmp_path: Path) -> None:
    """A file `args.yaml` does not make a run folder, with or without the wish to overwrite."""
    (tmp_path / "args.yaml").write_text("lr: 1")
    for overrides in ({}, OVERWRITE):
        with pytest.raises(UserError, match=r"run_dir: .*holds files"):
            trainer(config, tmp_path, overrides)
    assert tree(tmp_path, without=()) == {"args.yaml": b"lr: 1"}


def test_names_in_a_record_lead_nowhere_else(run_dir: Path) -> None:
    outside = run_dir.parent / "outside.txt"
    outside.write_text("mine")
    RunRecord(run_dir).add(["../outside.txt", str(outside), "../run/args.yaml"], trees=[".."])
    with (run_dir / NAME).open("a") as file:
        file.write('{"tree": "."}\n{"tree": ""}\n{"aside": "../"}\n[1]\n{"files": [null, {}]}\n')
    (run_dir / "notes.txt").write_text("mine")
    content = RunRecord(run_dir).read()
    assert content.aside is None and not content.owns("notes.txt")
    settle(run_dir)
    set_aside(run_dir, RunRecord(run_dir).found())
    delete_replaced(run_dir)
    assert outside.read_text() == "mine"
    assert tree(run_dir) == {"notes.txt": b"mine"}


def test_folders_that_only_look_like_ours_stay(config: Path, run_dir: Path) -> None:
    for name in ("../run.replaced", ".replaced", "checkpoints/thesis.incomplete"):
        (run_dir / name).mkdir()
        (run_dir / name / "notes.txt").write_text("mine")
    train(config, run_dir, {"resume": True, "max_steps": 3})
    train(config, run_dir, OVERWRITE)
    for name in ("../run.replaced", ".replaced", "checkpoints/thesis.incomplete"):
        assert (run_dir / name / "notes.txt").read_text() == "mine"


def test_retention_deletes_what_the_run_wrote_alone(config: Path, tmp_path: Path) -> None:
    run = trainer(config, tmp_path, {"ckpt_freq": 1, "num_ckpt_keep": 1})
    run.train_step()
    run.save()
    run.writer.wait()
    notes = checkpoint(tmp_path, 1) / "notes.txt"
    notes.write_text("mine")
    assert run.train() == 0
    assert notes.read_text() == "mine"
    assert [p.name[-1] for p in list_checkpoints(tmp_path)] == ["1", "4"]


# --- the older run waits --------------------------------------------------------------------------


def fails_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise UserError("the disk is on fire")

    monkeypatch.setattr("finetune.monitoring.metrics._open_tensorboard", fail)


def test_a_start_that_fails_late_puts_the_older_run_back_and_says_so(
    config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run_dir)
    fails_late(monkeypatch)
    with pytest.raises(UserError, match="on fire"):
        trainer(config, run_dir, OVERWRITE)
    assert tree(run_dir) == before
    assert "the earlier run is back in" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(config, run_dir, {"resume": True, "max_steps": 3}).step == 3


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
