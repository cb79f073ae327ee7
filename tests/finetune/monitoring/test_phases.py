"""Where a step's time goes, in the metrics and in a profile."""

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from full_disk import FULL, room_for
from training_tools import finish, lines_until, logged, logged_steps, start_program, train

from finetune.checkpoint.run_record import RunRecord
from finetune.config import load_config
from finetune.errors import UserError
from finetune.monitoring import StepProfiler
from finetune.step import LostSteps


def test_phases_make_up_the_step(config: Path, tmp_path: Path) -> None:
    train(config, tmp_path, {"do_ckpt": False, "data.prefetch_steps": 2})
    phases = ("data_wait_sec", "forward_backward_sec", "optimizer_sec")
    steps = zip(*(logged(tmp_path, name) for name in (*phases, "step_sec")), strict=True)
    for *parts, whole in steps:
        assert min(parts) >= 0 and sum(parts) <= whole


def test_chosen_steps_are_profiled(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "plain", {"max_steps": 5, "do_ckpt": False})
    options: dict[str, Any] = {
        "max_steps": 5,
        "profile_steps": [2, 4],
        "do_eval": True,
        "eval_freq": 3,
    }
    options |= {"ckpt_freq": 4}
    train(config, tmp_path / "run", options)
    assert logged(tmp_path / "run") == logged(tmp_path / "plain")
    (path,) = (tmp_path / "run/profile").iterdir()
    assert path.name == "steps_2-4.rank0.json.gz"
    assert f"profile of steps 2 to 4: {path}" in capsys.readouterr().out
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Annotations are there twice where the profiler shows them on the device as well.
    for phase in ("data_wait", "forward_backward", "optimizer"):
        assert names.count(phase) == 3, phase
    assert names.count("log") == 3 and names.count("evaluate") == 1
    assert names.count("save") == 1
    assert "aten::mm" in names or "aten::addmm" in names


def test_steps_that_are_done_are_not_profiled(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path, {"max_steps": 3})
    train(config, tmp_path, {"max_steps": 5, "resume": True, "profile_steps": [2, 4]})
    assert "step 2 is done already, so nothing is profiled" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    "steps", [[3], [0, 2], [3, 2], [1, 5], [1, 2, 3], "2", "x", [1.5, 2], {"a": 1}]
)
def test_steps_out_of_bounds_are_named(
    config: Path, steps: str | dict[str, int] | list[Any]
) -> None:
    with pytest.raises(UserError, match=r"\n  - profile_steps(\.a)?: "):
        load_config(config, {"profile_steps": steps})


@pytest.mark.parametrize("steps", [[2, 4], (2, 4), "[2, 4]", "2,4", "(2, 4)"])
def test_steps_may_be_written_in_several_ways(
    config: Path, steps: list[int] | tuple[int, int] | str
) -> None:
    assert load_config(config, {"profile_steps": steps}).profile_steps == [2, 4]


def profiled_steps(path: Path) -> int:
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    return names.count("forward_backward")


def test_a_signal_in_mid_profile_keeps_what_there_is(config: Path, tmp_path: Path) -> None:
    run = start_program(
        f"--config={config}", f"--run_dir={tmp_path}",
        "--max_steps=1000000", "--profile_steps=[2,900000]",
    )  # fmt: skip
    list(lines_until(run, "step 3/"))
    run.send_signal(signal.SIGINT)
    status, output = finish(run)
    assert status == 130, output
    last = logged_steps(tmp_path)[-1]
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"steps_2-{last}.rank0.json.gz"
    assert profiled_steps(path) == last - 1
    record = RunRecord(tmp_path)
    assert record.path.stat().st_size < 10_000
    assert record.found().foreign == []


def test_an_error_in_mid_profile_keeps_what_there_is(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = LostSteps.count

    def stop_at_four(self: Any, step: Any, *found: Any) -> None:
        if step == 4:
            raise UserError("lost")
        count(self, step, *found)

    monkeypatch.setattr(LostSteps, "count", stop_at_four)
    with pytest.raises(UserError, match="lost"):
        train(config, tmp_path, {"max_steps": 9, "profile_steps": [3, 8], "do_ckpt": False})
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_3-3.rank0.json.gz"


def test_a_full_disk_costs_the_profile_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler = StepProfiler([1, 1], tmp_path, rank=0, num_done=0)
    profiler.before_step(1)
    with room_for(100):
        profiler.after_step(1)
    assert f"json.gz could not be written: {FULL}. Training goes on" in caplog.text
    assert list((tmp_path / "profile").iterdir()) == []
    profiler.close()  # nothing is left to write
