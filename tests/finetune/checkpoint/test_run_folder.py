"""One run in the place of another: what no run wrote is not touched."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import run_folder_tools
from forked import Program
from recordings_tools import call
from run_folder_tools import OVERWRITE, tree
from training_tools import checkpoint, train, trainer

from finetune.checkpoint import list_checkpoints
from finetune.checkpoint.replacing import delete_replaced, set_aside, settle
from finetune.checkpoint.run_record import NAME, RunRecord
from finetune.cli import run
from finetune.cli import train as train_command
from finetune.errors import UserError

# Fixtures: pytest finds them by their names in this module.
finished = run_folder_tools.finished
run_dir = run_folder_tools.run_dir


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
            ("args.yaml", "log.train.txt", "metrics.train.jsonl", "metrics.eval.jsonl", "tb",
             "checkpoints", "summary.json")] == []  # fmt: skip
    assert "left where it is" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune.kept import write_whole

Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), "what a configuration begins with")
"""


@pytest.mark.parametrize("name", ["args.yaml", "mine.yaml"])
def test_half_a_file_of_a_run_that_was_killed_is_replaced_with_it(
    config: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = (run_dir / "args.yaml").read_text()
    assert Program(KILLED, str(run_dir / name)).wait(timeout=60) == -signal.SIGKILL
    assert (run_dir / "args.yaml").read_text() == whole
    assert len([*run_dir.glob(f".{name}.*")]) == 1
    train(config, run_dir, OVERWRITE)
    is_own = name == "args.yaml"
    assert len([*run_dir.glob(f".{name}.*")]) == (0 if is_own else 1)
    assert ("left where it is" in capsys.readouterr().out) == (not is_own)


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


def test_the_configuration_of_a_run_that_was_moved_does_not_act_on_its_old_place(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", {})
    before = tree(tmp_path / "run")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for args in (copy / "args.yaml", checkpoint(copy, 4) / "args.yaml"):
        assert call("train", args, "--overwrite_run_dir", "--max_steps=1") == 1
        assert f"--run_dir={copy} for the run there" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before
    for own in (copy, tmp_path / "run"):
        named = () if own.name == "run" else (f"--run_dir={own}",)
        assert call("train", own / "args.yaml", "--resume", *named) in (0, None)
