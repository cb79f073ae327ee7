"""Sweeps as they run: what is run and what is not, what is compared, stages and arrays."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_tools
from sweep_tools import sweep
from training_tools import checkpoint, logged_steps, saved_weights

from finetune.config import load_config
from finetune.sweep import run as sweep_run
from finetune.sweep.plan import load_sweep
from finetune.sweep.table import logged

# Fixtures: pytest finds them by their names in this module.
write = sweep_tools.write
commands = sweep_tools.commands


# A learning rate at which nothing is finite after a step.
FAILING: dict[str, Any] = {"optim.lr": "1e38", "max_norm": "1e38", "max_nonfinite_steps": 1}


def table(path: Path) -> dict[str, Any]:
    return {row["run"]: row for row in json.loads((path.parent / "sweep/table.json").read_text())}


def results(path: Path) -> dict[str, bytes]:
    """The table, the picture and the page of a sweep."""
    names = ("table.csv", "table.json", "loss.png", "report.html")
    return {name: (path.parent / "sweep" / name).read_bytes() for name in names}


def test_runs_are_compared_in_a_table_a_picture_and_a_page(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"wide": None, "narrow": {"model": {"attention_context": 3}, "optim.lr": 1e-3}})
    assert sweep(path) == 0
    rows = table(path)
    wide = rows["wide"]
    assert rows.keys() == {"wide", "narrow"} and wide["status"] == "finished"
    assert wide["parameters"] == wide["trainable_parameters"] > 20_000
    assert wide["eval_loss"] <= wide["eval_loss_first"]
    assert wide["eval_loss_best"] == min(wide["eval_loss"], wide["eval_loss_best"])
    assert wide["sec_per_epoch"] == pytest.approx(wide["sec_per_step"] * 7 / 2)  # batches of two
    assert 0 < wide["grad_norm"] <= wide["grad_norm_max"] and wide["peak_memory_gb"] > 0.05
    assert rows["narrow"]["changes"] == "model.attention_context=3 optim.lr=0.001"
    assert rows["narrow"]["eval_loss"] != wide["eval_loss"]

    folder = path.parent / "sweep"
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["run"] for line in lines] == ["wide", "narrow"]
    assert float(lines[0]["eval_loss"]) == wide["eval_loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "attention_context=3" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs no other file"
    printed = capsys.readouterr().out
    assert re.search(r"wide +│ finished +│ +" + f"{wide['eval_loss']:.3f}", printed)
    assert logged_steps(folder / "narrow") == [1, 2, 3, 4]


def test_what_is_finished_is_not_run_again_unless_it_was_changed(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {"one": None, "two": {"optim.lr": 1e-3}}
    path = write(runs)
    assert sweep(path) == 0 and len(commands) == 2
    assert sweep(path) == 0 and len(commands) == 2
    assert "one: finished before" in capsys.readouterr().out
    # Another way of saying the same, and what does not change what is learned.
    assert sweep(write({"one": {"log_freq": 2}, "two": {"optim": {"lr": "0.001"}}})) == 0
    assert len(commands) == 2

    path = write(runs | {"two": {"optim.lr": 2e-3}})
    assert sweep(path) == sweep(path, "--slurm") == 1 and len(commands) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("two (finished): optim.lr was 0.001 and is 0.002 now\n") == 2
    assert "one" not in refusal.split("nothing was run:")[1].split("Choose")[0]
    assert not (path.parent / "sweep/sweep.sbatch").exists()
    assert load_config(path.parent / "sweep/two/args.yaml").optim.lr == 1e-3
    assert checkpoint(path.parent / "sweep/two", 4).is_dir()

    assert sweep(path, "--overwrite_run_dir") == 0 and len(commands) == 3
    assert "two: runs again from its beginning: optim.lr was 0.001 and is 0.002" in (
        capsys.readouterr().out
    )
    assert load_config(path.parent / "sweep/two/args.yaml").optim.lr == 2e-3
    assert sweep(path, "--table") == 0 and len(commands) == 3


def test_numbers_of_other_settings_are_not_shown_under_the_new_ones(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {
        "one": None,
        "two": {"optim.lr": 1e-3},
        "after": {"after": "two", "max_steps": 2},
        "last": {"after": "after", "max_steps": 1},
    }
    assert sweep(write(runs)) == 0
    capsys.readouterr()
    path = write(runs | {"two": {"optim.lr": 2e-3}})
    before = results(path)
    assert sweep(path, "--table") == 0
    printed = capsys.readouterr().out
    assert re.search(r"two +│ outdated +│ +–", printed)
    # The file's table has numbers that this one has not.
    assert results(path) == before and table(path)["two"]["eval_loss"] is not None
    assert (
        "Not written: the table and the page" in printed
        and "numbers of two, after, last, which" in printed
    )
    assert "--table --overwrite_run_dir, which runs nothing" in printed
    assert sweep(path, "--table", "--overwrite_run_dir") == 0
    rows = table(path)
    statuses = ["finished", "outdated", "outdated", "outdated"]
    assert [row["status"] for row in rows.values()] == statuses
    for stage, earlier in (("after", "two"), ("last", "after")):
        assert rows[stage]["message"] == f"{earlier}, which it starts from, is outdated"
        assert rows[stage]["eval_loss"] is rows[stage]["train_loss"] is None
    assert "optim.lr was 0.001 and is 0.002 now" in rows["two"]["message"]
    assert rows["two"]["eval_loss"] is rows["two"]["train_loss"] is None
    assert rows["two"]["total_sec"] == rows["two"]["steps"] == 0
    plan = load_sweep(path)
    assert not logged(plan, plan.runs["two"], "train")
    assert logged(plan, plan.runs["one"], "train")

    # What started from it stays so when it was run again.
    assert sweep(path, "--only=two", "--overwrite_run_dir") == 0
    rows = table(path)
    statuses = ["finished", "finished", "outdated", "outdated"]
    assert [row["status"] for row in rows.values()] == statuses
    assert "two, which it starts from, was run again" in rows["after"]["message"]
    assert rows["two"]["eval_loss"] is not None


def test_a_table_stays_where_another_file_or_key_would_lose_its_numbers(
    write: Callable[..., Any],
    commands: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write({"one": None, "two": {"optim.lr": 1e-3}})
    assert sweep(path) == 0
    before = results(path)
    assert sweep(path, "--table", "--max_steps=2") == 0 and results(path) == before
    assert "numbers of one, two, which" in capsys.readouterr().out
    other = tmp_path / "other.yaml"
    other.write_text(write({"two": {"optim.lr": 1e-3}, "three": {"seed": 1}}).read_text())
    assert sweep(other, "--table") == 0 and results(path) == before
    assert "numbers of one, which" in capsys.readouterr().out
    # Also where something was run: its numbers are shown.
    assert sweep(other) == 0 and results(path) == before and len(commands) == 3
    printed = capsys.readouterr().out
    assert re.search(r"three +│ finished +│ +\d", printed) and "Not written" in printed
    # With all of the runs the table can be filled.
    path = write({"one": None, "two": {"optim.lr": 1e-3}, "three": {"seed": 1}})
    assert sweep(path, "--table") == 0 and table(path).keys() == {"one", "two", "three"}


def test_the_table_is_shown_also_where_the_data_are_gone(
    write: Callable[..., Any], commands: list[Any], config: Path
) -> None:
    original = Path(load_config(config).data.train_data)
    listing = original.with_name("gone.jsonl")
    listing.write_text(original.read_text())
    path = write({"one": {"data.train_data": str(listing)}})
    assert sweep(path) == 0
    before = table(path)
    listing.unlink()
    (path.parent / "sweep/table.json").unlink()
    assert sweep(path, "--table") == 0 and table(path) == before
    assert before["one"]["eval_loss"] is not None and len(commands) == 1
    assert sweep(path) == 1, "to run, they are needed"


def test_a_run_that_fails_is_in_the_table_and_the_others_are_run(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"bad": FAILING, "child": {"after": "bad"}, "good": None})
    assert sweep(path) == 1
    rows = table(path)
    assert [rows[name]["status"] for name in rows] == ["diverged", "skipped", "finished"]
    assert "not finite" in rows["bad"]["message"] and rows["bad"]["steps"] < 4
    assert rows["child"]["message"] == "not run: bad, which it starts from, diverged"
    assert "not finite" in (path.parent / "sweep/report.html").read_text()
    assert "child: not run" in capsys.readouterr().out

    # Repaired, it and what hangs on it are run.
    repaired = write({"bad": None, "child": {"after": "bad"}, "good": None})
    capsys.readouterr()
    assert sweep(repaired) == 0
    assert "bad: runs again from its beginning, as it failed before its first checkpoint: " in (
        capsys.readouterr().out
    )
    assert {row["status"] for row in table(path).values()} == {"finished"}
    assert len(commands) == 4 and logged_steps(path.parent / "sweep/bad") == [1, 2, 3, 4]


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_run_that_diverged_is_called_so_and_compared_with_none(
    write: Callable[..., Any],
    commands: list[Any],
    capsys: pytest.CaptureFixture[str],
    is_saved: bool,
) -> None:
    """The loss before training was its best, and stood beside those of the others."""
    saved = {"ckpt_freq": 1, "do_eval": False} if is_saved else {}
    runs = {"bad": FAILING | saved, "seed_1": {"seed": 1}, "seed_2": {"seed": 2}}
    path = write(runs)
    assert sweep(path) == 1
    rows = table(path)
    bad = rows["bad"]
    assert bad["status"] == "diverged" and bad["steps"] == 2 and bad["grad_norm"] > 0
    losses = ("eval_loss", "eval_loss_best", "eval_loss_best_step", "train_loss", "train_loss_best")
    assert {bad[name] for name in losses} == {None}
    assert all(rows["seed_1"][name] is not None for name in losses)
    way = "with --overwrite_run_dir." if is_saved else "again."
    remedy = f"the run has diverged. Lower optim.lr in {path}, and run that again"
    assert remedy in bad["message"] and bad["message"].endswith(way)
    printed = capsys.readouterr().out
    assert re.search(r"bad +│ diverged at 2/4 │ +– │ +– │ +– │", printed)
    assert "seed_1, seed_2 differ in seed alone" in printed
    assert "One seed says nothing" not in printed, "nothing is left that has one"

    # The way out is one.
    mended = write(runs | {"bad": {"optim.lr": 1e-3}})
    assert sweep(mended, *(["--overwrite_run_dir"] if is_saved else [])) == 0
    assert {row["status"] for row in table(path).values()} == {"finished"}
    # And if it diverges in the place of one with numbers, those are no longer true.
    assert sweep(write(runs), "--overwrite_run_dir") == 1 and sweep(path, "--table") == 0
    assert table(path)["bad"]["status"] == ("diverged" if is_saved else "outdated")


def test_a_run_that_diverged_within_what_is_tolerated_has_failed(
    write: Callable[..., Any], commands: list[Any]
) -> None:
    path = write({"bad": FAILING | {"max_nonfinite_steps": 10}, "child": {"after": "bad"}})
    assert sweep(path) == 1 and len(commands) == 1
    rows = table(path)
    assert [rows[name]["status"] for name in rows] == ["diverged", "skipped"]
    assert rows["child"]["message"] == "not run: bad, which it starts from, diverged"
    assert "after step 4, the last, is nan: the run has diverged." in rows["bad"]["message"]
    assert [each.name for each in (path.parent / "sweep/bad/checkpoints").iterdir()] == [
        "checkpoint_000004.diverged"
    ]


def test_a_run_that_failed_is_mended_in_several_goes(
    write: Callable[..., Any], commands: list[Any]
) -> None:
    for seed in range(2):
        assert sweep(write({"bad": FAILING | {"seed": seed}})) == 1 and len(commands) == seed + 1
    # A checkpoint is something, and so is what came back when its replacement failed.
    saving = FAILING | {"ckpt_freq": 1}
    path = write({"bad": saving})
    assert sweep(path) == 1 and len(commands) == 3
    assert checkpoint(path.parent / "sweep/bad", 1).is_dir()
    assert sweep(write({"bad": saving | {"seed": 1}})) == 1 and len(commands) == 3

    assert sweep(write({"good": {"do_ckpt": False}})) == 0 and len(commands) == 4
    assert sweep(write({"good": FAILING}), "--overwrite_run_dir") == 1 and len(commands) == 5
    assert logged_steps(path.parent / "sweep/good") == [1, 2, 3, 4]
    assert sweep(write({"good": {"seed": 1}})) == 1 and len(commands) == 5


def test_a_stage_starts_from_the_last_weights_of_the_one_before(
    write: Callable[..., Any], commands: list[Any], tmp_path: Path
) -> None:
    stages: dict[str, Any] = {
        "late": {"after": "early", "ttt.enabled": True, "duration_sec": 1, "max_steps": 2},
        "early": {"max_steps": 3},
    }
    path = write(stages)
    assert sweep(path) == 0
    run_dir = tmp_path / "sweep"
    assert f"--moshi_paths.init_from={checkpoint(run_dir / 'early', 3)}" in commands[1]
    plan = load_sweep(path)
    assert list(plan.runs) == ["early", "late"] and plan.runs["late"].first_step == 3
    learned, other = saved_weights(run_dir / "early", 3), saved_weights(run_dir / "late", 2)
    name = "transformer.layers.0.gating.linear_in.weight"
    assert 0 < (learned[name] - other[name]).abs().max() < 0.05 < learned[name].abs().max()

    # Whatever changes the first stage changes the second.
    stages["early"]["seed"] = 5
    again = [write(stages), "--overwrite_run_dir"]
    assert sweep(*again, "--only=early") == 0 and len(commands) == 3
    assert sweep(*again, "--only=late") == 0 and len(commands) == 4
    assert "--overwrite_run_dir=true" in commands[3]
    assert sweep(path) == 0 and len(commands) == 4


def test_a_stage_alone_needs_what_it_starts_from(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"early": None, "late": {"after": "early"}})
    assert sweep(path, "--only=late") == 1
    assert "late starts from early, which is not finished" in capsys.readouterr().err
    assert sweep(path, "--only=lat") == 1
    assert "has no run lat; it has early, late" in capsys.readouterr().err


def test_an_array_has_a_task_for_each_chain(
    write: Callable[..., Any],
    commands: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(
        {"a": None, "b": {"after": "a", "max_steps": 1}, "c": {"max_steps": 1}},
        slurm={"time": "4:00:00", "gres": "gpu:1"},
        processes=2,
    )
    assert sweep(path, "--slurm", "--max_steps=2") == 0
    assert not commands and "sbatch" in capsys.readouterr().out
    script = tmp_path / "sweep/sweep.sbatch"
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text and "#SBATCH --time=4:00:00\n" in text
    # What a task does, with the program replaced by one that shows its arguments.
    shown = text.replace(f"exec {sys.executable}", "exec printf '%s\\n'")
    done = [
        subprocess.run(
            ["bash", "-c", shown],
            env={"SLURM_ARRAY_TASK_ID": str(task)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for task in (0, 1)
    ]
    assert done[0][:5] == ["-m", "finetune", "sweep", str(path), "--max_steps=2"]
    assert done[0][5] == "--only=a,b" and done[1][5] == "--only=c"

    command = sweep_run._command(load_sweep(path), load_sweep(path).runs["c"], {"resume": "auto"})
    assert "--nproc-per-node=2" in command and command[-1] == "--resume=auto"


def test_an_array_of_some_runs_leaves_the_others_alone(
    write: Callable[..., Any],
    commands: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sweep(write({"a": None})) == 0 and len(commands) == 1
    runs = {"a": {"seed": 1}, "b": {"after": "a"}, "c": None, "d": {"after": "c"}, "e": None}
    path, script = write(runs), tmp_path / "sweep/sweep.sbatch"
    assert sweep(path, "--slurm") == 1 and not script.exists()
    # As the refusal advises.
    assert sweep(path, "--slurm", "--only=e,d,c") == 0
    assert "(\n  c,d\n  e\n)\n" in script.read_text()
    assert "#SBATCH --array=0-1\n" in script.read_text()
    assert "# 3 runs in 2 tasks" in script.read_text()
    capsys.readouterr()
    assert sweep(path, "--slurm", "--only=d") == 1
    assert "d starts from c, which is not finished" in capsys.readouterr().err


def test_an_array_that_overwrites_says_what_it_does_when_submitted_again(
    write: Callable[..., Any],
    commands: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, script = write({"a": None}), tmp_path / "sweep/sweep.sbatch"
    warning = "replaces finished runs without asking if it is submitted again after a change"
    assert sweep(path, "--slurm", "--overwrite_run_dir") == 0
    assert warning in capsys.readouterr().out
    assert "--overwrite_run_dir --only" in script.read_text()
    assert next(line for line in script.read_text().splitlines() if warning in line)[0] == "#"
    assert sweep(path, "--slurm") == 0
    assert "--overwrite_run_dir" not in script.read_text() + capsys.readouterr().out
