"""What a sweep takes for finished: runs are left alone only where their results are those of the
file. Their processes are replaced by ones that train nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_tools

from finetune.checkpoint.run_record import RunRecord
from finetune.config import load_config, save_config
from finetune.errors import UserError
from finetune.sweep import plan
from finetune.sweep.record import read_record, write_record
from finetune.sweep.run import Children, run_sweep
from finetune.sweep.table import collect

# A fixture: pytest finds it by its name in this module.
write = sweep_tools.write


class Processes:
    """Runs leave what the sweep looks at: settings, processes and a checkpoint.

    A run that is told to fail ends before its first checkpoint, and leaves the folder as it was;
    one that is killed then leaves aside what it was to replace, and the next start brings it back.
    """

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []
        self.fails: set[str] = set()
        self.is_killed: set[str] = set()

    def run(self, _: Any, command: list[str], *others: Any) -> int:
        base, *options = command[command.index("train") + 1 :]
        overrides = dict(option.removeprefix("--").split("=", 1) for option in options)
        args = load_config(base, overrides)
        run_dir = Path(args.run_dir)
        name, aside = run_dir.name, run_dir / ".replaced"
        self.given.append((name, "overwrite" if args.overwrite_run_dir else "resume"))
        if aside.is_dir():
            for own in ("args.yaml", ".run.jsonl"):
                (run_dir / own).unlink()
            shutil.copytree(aside, run_dir, dirs_exist_ok=True)
            shutil.rmtree(aside)
        if name in self.is_killed:
            aside.mkdir()
            for path in [path for path in run_dir.iterdir() if path != aside]:
                path.rename(aside / path.name)
            save_config(args, run_dir / "args.yaml")
            RunRecord(run_dir).create(replaces=aside.name)
            return -9
        if name in self.fails:
            return 1
        if (run_dir / "checkpoints").is_dir() and not args.overwrite_run_dir:
            return 0  # all steps are done
        shutil.rmtree(run_dir, ignore_errors=True)
        last = run_dir / "checkpoints" / f"checkpoint_{args.max_steps:06d}"
        last.mkdir(parents=True)
        for folder in (run_dir, last):
            save_config(args, folder / "args.yaml")
        number = [int(w.partition("=")[2]) for w in command if w.startswith("--nproc-per-node")]
        (run_dir / "summary.json").write_text(json.dumps({"processes": (number or [1])[0]}))
        return 0

    def taken(self) -> list[tuple[str, str]]:
        """The runs that were started since this was asked last, and how."""
        given, self.given = self.given, []
        return given


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    for check in ("_check_model", "_check_data"):  # which take longer than all of these tests
        monkeypatch.setattr(plan, check, lambda *_: [])
    fake = Processes()
    monkeypatch.setattr(Children, "run", lambda *arguments: fake.run(*arguments))
    return fake


def sweep(path: Path, *, overwrite: bool = False) -> int:
    found = plan.load_sweep(path)
    return run_sweep(found, list(found.runs), overwrite=overwrite)


def statuses(path: Path) -> dict[str, str]:
    return {row.run: row.status for row in collect(plan.load_sweep(path))}


@pytest.mark.parametrize("way", ["fails", "is_killed"])
def test_a_run_that_came_back_is_not_taken_for_the_one_that_was_to_replace_it(
    write: Callable[..., Any], processes: Processes, way: str
) -> None:
    runs: dict[str, Any] = {"early": None, "late": {"after": "early"}}
    assert sweep(write(runs)) == 0
    assert processes.taken() == [("early", "resume"), ("late", "resume")]

    runs["early"] = {"seed": 5}
    getattr(processes, way).add("late")
    path = write(runs)
    for _ in range(2):
        assert sweep(path, overwrite=True) == 1
        assert processes.taken()[-1] == ("late", "overwrite")
        assert statuses(path) == {"early": "finished", "late": "outdated"}
    getattr(processes, way).clear()
    assert sweep(path, overwrite=True) == 0
    assert processes.taken() == [("late", "overwrite")]
    assert sweep(path) == 0 and not processes.taken()
    assert statuses(path) == {"early": "finished", "late": "finished"}


def test_a_run_killed_in_the_place_of_another_leaves_that_ones_settings_unmixed(
    write: Callable[..., Any], processes: Processes
) -> None:
    assert sweep(write({"one": None})) == 0
    path = write({"one": {"seed": 5}})
    processes.is_killed.add("one")
    assert sweep(path, overwrite=True) == 1
    processes.is_killed.clear()
    processes.taken()
    # What is to be replaced still lies there, aside.
    with pytest.raises(UserError) as refusal:
        sweep(path)
    aside = path.parent / "sweep/one/.replaced"
    assert load_config(aside / "args.yaml").seed == 0
    assert "one (failed): it has not come to its first checkpoint" in str(refusal.value)
    assert f"to replace lies whole in {aside}: move that away" in str(refusal.value)
    assert sweep(path, overwrite=True) == 0
    assert processes.taken() == [("one", "overwrite")]
    assert load_config(path.parent / "sweep/one/args.yaml").seed == 5


def test_a_change_that_failed_and_was_taken_back_costs_no_second_run(
    write: Callable[..., Any], processes: Processes
) -> None:
    before = write({"one": None})
    assert sweep(before) == 0
    processes.fails.add("one")
    assert sweep(write({"one": {"seed": 5}}), overwrite=True) == 1
    processes.fails.clear()
    processes.taken()
    path = write({"one": None})
    assert sweep(path) == 0 and processes.taken() == [("one", "resume")]
    assert statuses(path) == {"one": "finished"}


def test_nothing_that_a_run_has_left_is_replaced_unasked(
    write: Callable[..., Any], processes: Processes
) -> None:
    runs: dict[str, Any] = {"done": None, "stopped": None, "never": {"max_steps": 3}}
    processes.fails.add("never")
    assert sweep(write(runs)) == 1
    for name in ("done", "stopped"):
        record = read_record(plan.load_sweep(write(runs)).runs[name])
        record.status = "finished" if name == "done" else "stopped"
        write_record(plan.load_sweep(write(runs)).runs[name], record)
    processes.fails.clear()
    processes.taken()

    path = write(runs, overrides=sweep_tools.COMMON | {"max_steps": 2, "seed": 7})
    files = sorted(path.parent.glob("sweep/**/*"))
    with pytest.raises(UserError) as refusal:
        sweep(path)
    message = str(refusal.value)
    assert "done (finished): max_steps was 4 and is 2 now; seed was 0 and is 7 now" in message
    assert "stopped (stopped): max_steps was 4 and is 2 now; seed" in message
    assert "never" not in message and "--sweep_dir" in message and "--overwrite_run_dir" in message
    assert not processes.taken() and sorted(path.parent.glob("sweep/**/*")) == files
    assert load_config(path.parent / "sweep/done/args.yaml").max_steps == 4

    # What is new is run, where it alone is asked for.
    found = plan.load_sweep(path)
    assert run_sweep(found, ["never"]) == 0
    assert processes.taken() == [("never", "resume")]
    assert sweep(path, overwrite=True) == 0
    assert processes.taken() == [("done", "overwrite"), ("stopped", "overwrite")]
    assert load_config(path.parent / "sweep/done/args.yaml").max_steps == 2


HARMLESS_CHANGES: dict[str, Any] = {
    "gradient_checkpointing": "selective",
    "data.cache_dir": "cache",
    "data.prefetch_steps": 1,
    "compile": False,
    "ckpt_async": False,
    "device": "cpu",
    "max_nonfinite_steps": 3,
    "parallel.hang_timeout_sec": 60,
    "parallel.shard_size": 1,
    "profile_steps": [2, 3],
    "ttt.scan_checkpoint_group_size": 4,
    "num_ckpt_keep": 1,
}


def test_a_change_that_alters_no_result_costs_no_run(
    write: Callable[..., Any], processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    ttt = {"ttt.enabled": True, "ttt.method": "linear"}
    assert sweep(write({"done": ttt, "stopped": ttt})) == 0
    record = read_record(plan.load_sweep(write({"stopped": ttt})).runs["stopped"])
    record.status = "stopped"
    write_record(plan.load_sweep(write({"stopped": ttt})).runs["stopped"], record)
    processes.taken()

    path = write({"done": ttt | HARMLESS_CHANGES, "stopped": ttt | HARMLESS_CHANGES})
    capsys.readouterr()
    assert sweep(path) == 0
    assert processes.taken() == [("stopped", "resume")]
    assert statuses(path) == {"done": "finished", "stopped": "finished"}
    said = capsys.readouterr().out
    assert "done: finished before, and taken as it is: " in said
    for key in HARMLESS_CHANGES.keys() - {"compile", "device"}:
        assert f"{key} was " in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_eval", False),
        ("eval_freq", 1),
        ("data.eval_data", "{train}"),
        ("health_sec", 3),
        ("do_ckpt", False),
        ("save_adapters", False),
    ],
)
def test_a_change_of_what_is_measured_or_saved_is_a_change(
    write: Callable[..., Any], processes: Processes, config: Path, key: str, value: Any
) -> None:
    """The table is of what is measured, and the next stage starts from what is saved."""
    if value == "{train}":
        value = load_config(config).data.train_data
    assert sweep(write({"one": {"lora.enable": True, "full_finetuning": False}})) == 0
    with pytest.raises(UserError, match=rf"one \(finished\): {key} was "):
        sweep(write({"one": {"lora.enable": True, "full_finetuning": False, key: value}}))


def test_a_base_that_overwrites_does_not_ask_for_it(
    write: Callable[..., Any], processes: Processes, config: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(config.read_text() + "\noverwrite_run_dir: true\n")
    assert sweep(write({"one": None}, base=str(base))) == 0
    with pytest.raises(UserError, match=r"one \(finished\): seed was 0 and is 5 now"):
        sweep(write({"one": {"seed": 5}}, base=str(base)))
    assert processes.taken() == [("one", "resume")]


def test_a_start_that_failed_stands_in_nobodys_way(
    write: Callable[..., Any], processes: Processes, tmp_path: Path
) -> None:
    """It has left its settings and its record, and nothing that took time."""
    path = write({"one": {"seed": 5}})
    run_dir = tmp_path / "sweep/one"
    run_dir.mkdir(parents=True)
    save_config(plan.load_sweep(write({"one": None})).runs["one"].args, run_dir / "args.yaml")
    RunRecord(run_dir).create()
    assert sweep(write({"one": {"seed": 5}})) == 0
    assert load_config(path.parent / "sweep/one/args.yaml").seed == 5


def test_another_number_of_processes_is_another_experiment(
    write: Callable[..., Any], processes: Processes
) -> None:
    assert sweep(write({"one": None}, processes=1)) == 0
    path = write({"one": None}, processes=2)
    assert [row.message for row in collect(plan.load_sweep(path))] == [
        "processes was 1 and is 2 now"
    ]
    with pytest.raises(UserError, match=r"one \(finished\): processes was 1 and is 2 now"):
        sweep(path)
    assert sweep(path, overwrite=True) == 0 and sweep(path) == 0
    assert processes.taken() == [("one", "resume"), ("one", "overwrite")]


def test_a_run_whose_folder_was_deleted_is_run_again(
    write: Callable[..., Any], processes: Processes
) -> None:
    path = write({"early": None, "late": {"after": "early"}})
    assert sweep(path) == 0
    processes.taken()
    shutil.rmtree(path.parent / "sweep/early")
    assert statuses(path) == {"early": "new", "late": "finished"}
    # The run that started from it would have to be made again as well.
    with pytest.raises(UserError, match=r"late \(finished\): early, which it starts from, is to"):
        sweep(path)
    assert not processes.taken()
    assert sweep(path, overwrite=True) == 0
    assert processes.taken() == [("early", "resume"), ("late", "overwrite")]


def test_lists_reach_a_run_and_the_table_as_they_are_written_on_a_command_line(
    write: Callable[..., Any], processes: Processes
) -> None:
    path = write({"one": {"profile_steps": [2, 3]}})
    assert sweep(path) == 0
    assert load_config(path.parent / "sweep/one/args.yaml").profile_steps == [2, 3]
    assert [row.changes for row in collect(plan.load_sweep(path))] == ["profile_steps=2,3"]
