"""Mistakes in a sweep's file and in its runs, all reported before the first run."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_tools
from data_tools import write_jsonl, write_recording
from full_disk import FULL, room_for
from sweep_tools import COMMON, sweep

from finetune.config import load_config
from finetune.errors import UserError
from finetune.sweep.plan import load_sweep

# Fixtures: pytest finds them by their names in this module.
write = sweep_tools.write
commands = sweep_tools.commands


def problems(write: Callable[..., Any], runs: dict[str, Any], **others: Any) -> str:
    with pytest.raises(UserError) as error:
        load_sweep(write(runs, **others))
    return str(error.value)


def test_all_problems_of_all_runs_are_reported_before_the_first(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {
        "good": None,
        "misspelled": {"optim.lrr": 1, "ttt.chunk_size": 0},
        "wrong": {"optim": {"lr": "fast"}},
    }
    path = write(runs)
    assert sweep(path) == 1 and not commands
    message = capsys.readouterr().err
    assert "sweep.yaml has 3 problems" in message
    assert "misspelled: optim.lrr: unknown key, did you mean optim.lr?" in message
    assert "misspelled: ttt.chunk_size: must be 1 or more, got 0" in message
    assert "wrong: optim.lr: expected a number, got 'fast'" in message
    assert not (path.parent / "sweep").exists()
    # What is wrong with all of them is said once; on the command line it counts for all.
    message = problems(write, {"a": None, "b": None}, overrides=COMMON | {"batch_size": 0})
    assert "has a problem" in message and "all runs: batch_size: must be 1 or more" in message
    assert sweep(write({"a": None, "b": None}), "--durationn_sec=3") == 1
    assert "all runs: durationn_sec: unknown key, did you mean duration_sec?" in (
        capsys.readouterr().err
    )


def test_a_mistake_of_one_kind_hides_none_of_another(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {
        "one": {"run_dir": "elsewhere", "optim.lrr": 1},
        "two": {"after": "twoo", "batch_size": "many"},
        "three": {"after": "four", "seeed": 1},
        "four": {"after": "three"},
        "a/b": {"max_stepps": 3},
    }
    path = write(runs, slrum={}, overrides=COMMON | {"overwrite_run_dir": True, "wandb.key": "x"})
    assert sweep(path, "--run_dir=here", "--resume=true") == 1 and not commands
    message = capsys.readouterr().err
    assert "sweep.yaml has 13 problems" in message
    for expected in (
        "slrum: unknown key, did you mean slurm?",
        "'a/b': a name is made of letters",
        "two, after: there is no run 'twoo'. Did you mean two?",
        "after: three after four after three: they would wait for each other for ever",
        "overrides, overwrite_run_dir: remove it: --overwrite_run_dir on the command line",
        "overrides, wandb.key: remove it: ",
        "--run_dir: remove it: each run has its own folder in sweep_dir",
        "--resume: remove it: a sweep always continues what was interrupted",
        "one: run_dir: remove it: each run has its own folder in sweep_dir",
        "one: optim.lrr: unknown key, did you mean optim.lr?",
        "two: batch_size: expected a whole number, got 'many'",
        "three: seeed: unknown key, did you mean seed?",
        "a/b: max_stepps: unknown key, did you mean max_steps?",
    ):
        assert expected in message


def test_what_is_left_out_of_the_base_is_said_once_with_its_runs(
    write: Callable[..., Any], config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs: dict[str, Any] = {
        name: {"ttt.enabled": True, "ttt.method": method}
        for name, method in (("inner", "in_place"), ("line", "linear"), ("two_layers", "mlp"))
    }
    load_sweep(write(runs))
    said = [record.message for record in caplog.records if "left out" in record.message]
    expected = (
        f"line, two_layers: ttt.chunk_size of {config} is left out: it is not for this method"
    )
    assert said.count(expected) == 1 and len(said) == len(set(said))
    assert all(line.startswith("line, two_layers: ttt.") for line in said)


def test_what_only_models_and_data_show_is_reported_as_well(write: Callable[..., Any]) -> None:
    message = problems(
        write,
        {
            "deep": {"ttt.enabled": True, "ttt.start_layer": 7},
            "nowhere": {"data.train_data": "nowhere.jsonl"},
            "other": {"after": "ttt", "ttt.enabled": True, "ttt.write": "delta"},
            "ttt": {"ttt.enabled": True},
            "random": {"model.gating": "none", "moshi_paths.random_init": True},
            "child": {"after": "random", "moshi_paths.random_init": True},
        },
    )
    assert "has 4 problems" in message
    assert "deep: ttt.start_layer: 7 is beyond the model's last layer" in message
    assert "nowhere: data.train_data: " in message
    assert "other: after ttt: ttt.write: is sum in the earlier run, and delta here" in message
    assert "child: after random: model.gating: is none in the earlier run, and silu" in message


def test_one_message_has_what_each_stage_of_checking_finds(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """At once configurations, files and the command line; then models, and what lies in the
    folder."""
    assert sweep(write({"done": {"max_steps": 1}})) == 0 and len(commands) == 1
    capsys.readouterr()
    nowhere: dict[str, Any] = {"data.train_data": "nowhere.jsonl", "moshi_paths.mimi_path": "no.st"}
    runs: dict[str, Any] = {
        "done": {"max_steps": 1, "seed": 3},
        "misspelled": {"optim.lrr": 1},
        "follows": {"after": "misspelled", "data.eval_data": "gone.jsonl"},
        "nowhere": nowhere | {"moshi_paths.moshi_path": "none.st"},
        "deep": {"ttt.enabled": True, "ttt.start_layer": 7},
        "waits": {"after": "early"},
        "early": None,
    }
    path = write(runs, slurm={"time": "1:00\n#SBATCH --x"})
    only = "done,misspelled,follows,nowhere,deep,waits,lost"
    assert sweep(path, f"--only={only}", "--slurm", "--wandb.key=deadbeefcafe") == 1
    message = capsys.readouterr().err
    for expected in (
        "sweep.yaml has 8 problems",
        "misspelled: optim.lrr: unknown key",
        "follows: data.eval_data: gone.jsonl does not exist",
        "nowhere: data.train_data: nowhere.jsonl does not exist",
        "nowhere: moshi_paths.mimi_path: there is no file no.st",
        "nowhere: moshi_paths.moshi_path: there is no file none.st",
        "--only: ",
        "has no run lost; it has done, ",
        "wandb.key: a script that stays on the disk is no place for secrets",
        "slurm, time: ",
    ):
        assert expected in message, expected
    for name in ("misspelled", "follows", "nowhere"):
        del runs[name]
    assert sweep(write(runs), "--only=done,deep,waits") == 1
    message = capsys.readouterr().err
    for expected in (
        "sweep.yaml has 3 problems",
        "deep: ttt.start_layer: 7 is beyond the model's last layer",
        "waits starts from early, which is not finished: run that.",
        "already holds runs of other settings",
        "- done (finished): seed was 0 and is 3 now",
    ):
        assert expected in message, expected
    assert len(commands) == 1


READS_A_SWEEP = """
import sys
from pathlib import Path
from finetune.sweep.plan import load_sweep
try:
    load_sweep(Path(sys.argv[1]))
except ValueError as problems:
    print(problems)
"""


def test_broken_data_come_in_one_order(write: Callable[..., Any], tmp_path: Path) -> None:
    """However a process hashes names: with these two seeds a set of the keys has two orders."""
    keys = ["data.train_data", "data.eval_data"]
    for key in keys:
        (tmp_path / f"{key}.jsonl").write_text("not json\n")
    path = write({"one": {key: str(tmp_path / f"{key}.jsonl") for key in keys}})
    command = [sys.executable, "-c", READS_A_SWEEP, path]
    processes = [
        subprocess.Popen(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in "01"
    ]
    for process in processes:
        message, _ = process.communicate(timeout=120)
        assert re.findall(r"(data\.\w+)\.jsonl:1: malformed", message) == keys


def test_recordings_that_share_a_transcript_are_named_where_one_run_uses_both(
    write: Callable[..., Any], tmp_path: Path
) -> None:
    lists = {}
    for suffix in ("wav", "flac"):
        line = write_recording(tmp_path, f"a.{suffix}", 4.0)
        lists[suffix] = str(write_jsonl(tmp_path / f"{suffix}.jsonl", [line]))
    both = {"data.train_data": lists["wav"], "data.eval_data": lists["flac"]}
    runs = {
        "both": both,
        "unseen": both | {"do_eval": False},
        "train": {"data.train_data": lists["wav"]},
        "evaluation": {"data.eval_data": lists["flac"]},
    }
    message = problems(write, runs)
    assert f"{tmp_path / 'a.flac'} and {tmp_path / 'a.wav'} share the transcript" in message
    assert "has a problem" in message and re.search(r"\bboth: ", message)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"a": {"after": "b"}, "b": {"after": "a"}}, "after: a after b after a: they would wait"),
        ({"a": {"after": "a"}}, "a after a"),
        ({"first": None, "b": {"after": "frist"}}, "no run 'frist'. Did you mean first"),
        ({"a/b": None}, "'a/b': a name is made of letters"),
        ({"Table": None}, "runs, Table: choose another name; Table.json is the sweep's own table"),
        ({"a": {"run_dir": "x"}}, "a: run_dir: remove it: each run has its own folder"),
        ({"a": {"wandb": {"key": "x"}}}, "a: wandb.key: remove it: .* no place for secrets"),
        ({"a": "fast"}, "a: expected `key: value` lines below it, got 'fast'"),
        ({"a": {"do_ckpt": False}, "b": {"after": "a"}}, "b: after: a has do_ckpt: false"),
        ({"a": None, "b": {"after": "a", "moshi_paths.init_from": "x"}}, "says already"),
        ({}, "runs: there are none"),
    ],
    ids=str,
)
def test_mistakes_in_the_runs(write: Callable[..., Any], runs: Any, message: Any) -> None:
    assert re.search(message, problems(write, runs))


def test_a_full_disk_is_said_before_the_first_run(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"a": None})
    with room_for(0):
        assert sweep(path) == 1
    said = f"sweep_dir: cannot write to {path.parent / 'sweep'}: {FULL}."
    assert said in capsys.readouterr().err
    assert not commands and not (path.parent / "sweep").exists()


def test_mistakes_in_the_file(
    write: Callable[..., Any], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"a": None})
    text = path.read_text()
    path.write_text(text + "  a:\n    seed: 3\n")
    with pytest.raises(UserError, match=r"sweep.yaml, line \d+.*'a' appears twice"):
        load_sweep(path)
    path.write_text("")
    with pytest.raises(UserError, match=r"sweep.yaml is empty"):
        load_sweep(path)
    path.write_text(text.replace("base:", "basis:").replace("sweep_dir", "sweepdir"))
    with pytest.raises(UserError, match=r"(?s)has 4 problems.*did you mean base.*did you mean swe"):
        load_sweep(path)
    path.write_text(text.replace(str(config), "exampel.yaml"))
    with pytest.raises(UserError, match=r"no configuration file exampel\.yaml"):
        load_sweep(path)
    with pytest.raises(UserError, match=r"Did you mean .*sweep\.yaml"):
        load_sweep(tmp_path / "swep.yaml")
    with pytest.raises(UserError, match="is the configuration of one run"):
        load_sweep(config)
    path.write_text(text)
    with pytest.raises(UserError, match=f"is a sweep, .*moshi-ttt sweep {path}"):
        load_config(path)
    assert sweep(path, "--table") == 1
    assert "nothing has been run yet" in capsys.readouterr().err
    assert sweep(path, "--slurm=maybe") == 1
    assert "--slurm: expected true or false" in capsys.readouterr().err
    assert sweep(path, "--slurm", "--wandb.key=deadbeefcafe") == 1
    assert "no place for secrets" in capsys.readouterr().err
    assert not [*tmp_path.rglob("*.sbatch")]


@pytest.mark.parametrize("name", ["table.csv", "table.json", "loss.png", "report.html"])
def test_files_of_no_sweep_stay(
    write: Callable[..., Any], commands: list[Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"a": None})
    kept = path.parent / "sweep" / name
    kept.parent.mkdir()
    kept.write_text("mine")
    for words in ([], ["--table"], ["--overwrite_run_dir"]):
        assert sweep(path, *words) == 1
        said = capsys.readouterr().err
        assert f"{kept} is there already, and was not written by moshi-ttt sweep: give an" in said
    assert not commands and [*kept.parent.iterdir()] == [kept] and kept.read_text() == "mine"


def test_a_script_of_no_sweep_stays(
    write: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"a": None})
    script = path.parent / "sweep/sweep.sbatch"
    script.parent.mkdir()
    script.write_text("#!/bin/bash\n#SBATCH --job-name=mine\n")
    assert sweep(path, "--slurm") == 1
    assert f"{script} is there already, and was not written by" in capsys.readouterr().err
    assert "mine" in script.read_text()
    script.unlink()
    for _ in range(2):
        assert sweep(path, "--slurm") == 0
