"""Sweeps: what runs, what does not, what is compared, and mistakes in the file."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import COMMAND, Program
from training_tools import PLAIN, checkpoint, logged_steps, saved_weights

from finetune.cli import main
from finetune.config import load_config
from finetune.errors import UserError
from finetune.sweep import run as sweep_run
from finetune.sweep.plan import load_sweep
from finetune.sweep.run import Children, read_record
from finetune.sweep.table import logged
from finetune.trainer import Trainer

ROOT = Path(__file__).parents[3]
DIALOGUES = ROOT / "example/demo/dialogues"
COMMON: dict[str, Any] = {
    **PLAIN,
    "max_steps": 4,
    "do_eval": True,
    "eval_freq": 2,
    "model.attention_context": 9,
}
# A learning rate at which nothing is finite after a step.
FAILING: dict[str, Any] = {"optim.lr": "1e38", "max_norm": "1e38", "max_nonfinite_steps": 1}


@pytest.fixture
def write(config: Path, tmp_path: Path) -> Callable[..., Any]:
    def write_sweep(runs: Any, **others: Any) -> Path:
        content: dict[str, Any] = {
            "base": str(config),
            "sweep_dir": str(tmp_path / "sweep"),
            "overrides": COMMON,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content | {"runs": runs} | others, sort_keys=False))
        return path

    return write_sweep


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are trained in this process, which is faster; the command lines that were given."""
    given: list[Any] = []

    def train_here(self: Any, command: Any, log: Any, label: Any, environment: Any) -> int:
        base, *options = command[command.index("train") + 1 :]
        given.append(options)
        overrides = dict(option.removeprefix("--").split("=", 1) for option in options)
        try:
            return Trainer(load_config(base, overrides)).train()
        except UserError as error:
            log.write(f"\nerror: {error}\n")
            return 1

    monkeypatch.setattr(Children, "run", train_here)
    return given


def sweep(*arguments: Any) -> str | int:
    """`moshi-ttt sweep ...` in this process; its exit status."""
    old, sys.argv = sys.argv, ["moshi-ttt", "sweep", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as leaving:
            main()
    finally:
        sys.argv = old
    return leaving.value.code or 0


def table(path: Path) -> dict[str, Any]:
    return {row["run"]: row for row in json.loads((path.parent / "sweep/table.json").read_text())}


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

    assert sweep(write(runs | {"two": {"optim.lr": 2e-3}})) == 0 and len(commands) == 3
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
    }
    assert sweep(write(runs)) == 0
    capsys.readouterr()
    path = write(runs | {"two": {"optim.lr": 2e-3}})
    assert sweep(path, "--table") == 0
    rows = table(path)
    assert [row["status"] for row in rows.values()] == ["finished", "outdated", "finished"]
    assert "optim.lr was 0.001 and is 0.002 now" in rows["two"]["message"]
    assert rows["two"]["eval_loss"] is rows["two"]["train_loss"] is None
    assert rows["two"]["total_sec"] == rows["two"]["steps"] == 0
    assert re.search(r"two +│ outdated +│ +–", capsys.readouterr().out)
    plan = load_sweep(path)
    assert not logged(plan, plan.runs["two"], "train")
    assert logged(plan, plan.runs["one"], "train")

    # What started from it is, once it was run again; what is not chosen keeps its status.
    assert sweep(path, "--only=two") == 0
    rows = table(path)
    assert [row["status"] for row in rows.values()] == ["finished", "finished", "outdated"]
    assert "two, which it starts from, was run again" in rows["after"]["message"]
    assert rows["two"]["eval_loss"] is not None


def test_a_run_that_fails_is_in_the_table_and_the_others_are_run(
    write: Callable[..., Any], commands: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"bad": FAILING, "child": {"after": "bad"}, "good": None})
    assert sweep(path) == 1
    rows = table(path)
    assert [rows[name]["status"] for name in rows] == ["failed", "skipped", "finished"]
    assert "not finite" in rows["bad"]["message"] and rows["bad"]["steps"] < 4
    assert rows["child"]["message"] == "not run: bad, which it starts from, failed"
    assert "not finite" in (path.parent / "sweep/report.html").read_text()
    assert "child: not run" in capsys.readouterr().out

    # Repaired, it and what hangs on it are run.
    assert sweep(write({"bad": None, "child": {"after": "bad"}, "good": None})) == 0
    assert {row["status"] for row in table(path).values()} == {"finished"}
    assert len(commands) == 4


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
    assert sweep(write(stages), "--only=early") == 0 and len(commands) == 3
    assert sweep(path, "--only=late") == 0 and len(commands) == 4
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


def test_ctrl_c_saves_and_the_same_command_goes_on(
    write: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write({"one": {"max_steps": 1_000_000}, "two": None})
    plan = load_sweep(path)
    process = Program(COMMAND, "sweep", path)
    log = tmp_path / "sweep/one.log"
    assert process.stdout is not None
    assert "tail -f" in next(line for line in process.stdout if "running" in line)
    with subprocess.Popen(["tail", "-F", "-n+1", log], stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        next(line for line in tail.stdout if "step 3/" in line)
        with pytest.raises(UserError, match="being run by another process"):
            sweep_run.run_sweep(plan, ["one"])
        os.killpg(process.pid, signal.SIGINT)  # as from a terminal: to both
        output, _ = process.communicate(timeout=60)
        tail.terminate()
    assert process.returncode == 128 + signal.SIGINT
    assert "one: stopped after" in output and "the same command goes on" in output
    assert "Traceback" not in output + log.read_text()
    assert not (tmp_path / "sweep/two").exists()
    assert read_record(plan.runs["one"]).status == "stopped"
    last = logged_steps(tmp_path / "sweep/one")[-1]
    assert checkpoint(tmp_path / "sweep/one", last).is_dir()

    given: list[Any] = []

    def remembered(self: Children, command: list[str], *_: Any) -> int:
        given.append(command)
        return 0

    monkeypatch.setattr(Children, "run", remembered)
    assert sweep(path) == 0
    assert [("--resume=auto" in command) for command in given] == [True, True]


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


# --- mistakes -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"a": {"after": "b"}, "b": {"after": "a"}}, "after: a after b after a: they would wait"),
        ({"a": {"after": "a"}}, "a after a"),
        ({"first": None, "b": {"after": "frist"}}, "no run 'frist'. Did you mean first"),
        ({"a/b": None}, "'a/b': a name is made of letters"),
        ({"a": {"run_dir": "x"}}, "a, run_dir: remove it: each run has its own folder"),
        ({"a": {"wandb": {"key": "x"}}}, "a, wandb.key: remove it: .* no place for secrets"),
        ({"a": "fast"}, "a: expected `key: value` lines below it, got 'fast'"),
        ({"a": {"do_ckpt": False}, "b": {"after": "a"}}, "b: after: a has do_ckpt: false"),
        ({"a": None, "b": {"after": "a", "moshi_paths.init_from": "x"}}, "says already"),
        ({}, "runs: there are none"),
    ],
    ids=str,
)
def test_mistakes_in_the_runs(write: Callable[..., Any], runs: Any, message: Any) -> None:
    assert re.search(message, problems(write, runs))


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


# --- what is shipped ------------------------------------------------------------------------------

SHIPPED = [path for path in (ROOT / "example").glob("*.yaml") if "sweep_dir:" in path.read_text()]
ON_DIALOGUES: dict[str, Any] = {
    "data.train_data": str(DIALOGUES / "train.jsonl"),
    "data.eval_data": str(DIALOGUES / "eval.jsonl"),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_sweep(path, ON_DIALOGUES)
    assert len(plan.runs) >= 4 and path.stem == plan.folder.name


def test_the_modern_stack_has_the_six_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_sweep(ROOT / "example/modern_stack.yaml", ON_DIALOGUES)
    old = ("layer_norm", "none", "sin")
    new = ("rms_norm_f32", "silu", "rope")
    found = {
        name: (run.args.model.norm, run.args.model.gating, run.args.model.positional_embedding)
        for name, run in plan.runs.items()
    }
    assert found == {
        "baseline": old,
        "modern_norm": (new[0], old[1], old[2]),
        "modern_ffn": (old[0], new[1], old[2]),
        "modern_positions": (old[0], old[1], new[2]),
        "partial_modern": (new[0], new[1], old[2]),
        "full_modern": new,
    }
    assert len({run.args.seed for run in plan.runs.values()}) == 1


def test_the_curriculum_grows_and_ends_as_its_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = load_sweep(ROOT / "example/curriculum.yaml", ON_DIALOGUES).runs
    stages = [runs[name].args for name in ("short", "middle", "long")]
    lengths = [stage.duration_sec for stage in stages]
    windows = [stage.model.attention_context or 0 for stage in stages]
    assert all(windows)
    assert lengths == sorted(lengths) and windows == sorted(windows, reverse=True)
    assert len({stage.duration_sec * stage.batch_size for stage in stages}) == 1
    direct = runs["direct"].args
    assert direct.max_steps == sum(stage.max_steps for stage in stages)
    assert (direct.duration_sec, direct.model) == (lengths[-1], stages[-1].model)


def test_the_documented_file_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    path = tmp_path / "documented.yaml"
    path.write_text("".join(blocks))
    plan = load_sweep(path, ON_DIALOGUES)
    assert plan.chains() == [["off"], ["chunk_10"], ["chunk_50", "longer"]]
    assert plan.runs["longer"].args.ttt.write == "delta" and plan.slurm["gres"] == "gpu:1"


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_sweeps_run(path: Path, tmp_path: Path) -> None:
    """Every run of them, a few steps, in processes of their own."""
    short: dict[str, Any] = {
        **ON_DIALOGUES,
        "max_steps": 3,
        "eval_freq": 0,
        "batch_size": 2,
        "log_freq": 1,
    }
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "sweep", str(path), f"--sweep_dir={tmp_path / 'out'}"]
        + [f"--{key}={value}" for key, value in short.items()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/table.json").read_text())
    assert {row["status"] for row in rows} == {"finished"}
