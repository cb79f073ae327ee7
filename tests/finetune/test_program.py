"""`train.py` in processes of its own: killed, interrupted, on several devices, without network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_tools import (
    FULL,
    HANGS_WHILE_SAVING,
    KILLED_AFTER_STEP,
    PLAIN,
    REPOSITORY,
    STOPPED_AFTER_STEP,
    THEN_RUN,
    assert_same_weights,
    checkpoint,
    finish,
    lines_until,
    logged,
    logged_steps,
    run_ranks,
    saved_weights,
    start_program,
    start_ranks,
    torchrun,
    train,
)

from finetune import interrupt
from finetune.interrupt import Interrupt

ENDLESS = ("--max_steps=1000000",)


def options(overrides: dict[str, Any]) -> list[Any]:
    return [f"--{key}={value}" for key, value in overrides.items()]


def test_ten_steps_are_five_steps_a_kill_and_five_more(config: Path, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"max_steps": 10, "ckpt_freq": 5, **FULL}
    overrides |= {"param_dtype": "bfloat16", "ckpt_async": False}
    arguments = [f"--config={config}", f"--run_dir={tmp_path / 'killed'}", *options(overrides)]
    # ckpt_async is off, or step 7 may be over before step 5 is written.
    arguments += ["--data.num_workers=2", "--data.prefetch_steps=2"]
    killed = start_program(*arguments, after=KILLED_AFTER_STEP.format(step=7))
    assert finish(killed)[0] == -signal.SIGKILL
    assert logged_steps(tmp_path / "killed") == [1, 2, 3, 4, 5, 6, 7]
    assert not checkpoint(tmp_path / "killed", 7).exists()

    status, output = finish(start_program(*arguments, "--resume"))
    assert status == 0, output
    assert "resuming" in output and "step 6/10" in output and "step 5/10" not in output
    train(config, tmp_path / "whole", overrides)
    assert logged_steps(tmp_path / "killed") == list(range(1, 11))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert_same_weights(
        saved_weights(tmp_path / "killed", 10), saved_weights(tmp_path / "whole", 10)
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_a_message(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    background = ("--data.num_workers=2", "--data.prefetch_steps=2")
    run = start_program(f"--config={config}", f"--run_dir={tmp_path}", *background, *ENDLESS)
    list(lines_until(run, "step 3/"))
    # Ctrl-C reaches every process of the terminal's group, the workers that read data as well.
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    status, output = finish(run)
    assert status == 128 + number
    assert f"{number.name}: finishing this step" in output
    assert f"continue with --resume --run_dir={tmp_path}" in output.splitlines()[-1]
    assert "Traceback" not in output
    last = logged_steps(tmp_path)[-1]
    assert f"stopped after step {last}" in output
    assert checkpoint(tmp_path, last).is_dir()
    assert train(config, tmp_path, {"max_steps": last + 2, "resume": True}).step == last + 2


def test_a_second_ctrl_c_leaves_at_once(config: Path, tmp_path: Path) -> None:
    run = start_program(
        f"--config={config}", f"--run_dir={tmp_path}", *ENDLESS, after=HANGS_WHILE_SAVING
    )
    list(lines_until(run, "step 1/"))
    os.killpg(run.pid, signal.SIGINT)
    list(lines_until(run, "saving"))
    with pytest.raises(subprocess.TimeoutExpired):  # Ctrl-C twice within a second is one
        run.wait(timeout=1.2)
    os.killpg(run.pid, signal.SIGINT)
    status, output = finish(run)
    assert status == 128 + signal.SIGINT and output.endswith("\nstopped by SIGINT\n"), output
    assert not (tmp_path / "checkpoints").exists()


def test_signals_that_come_together_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    left: list[Any] = []
    monkeypatch.setattr(interrupt.os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)

    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # another thread listens

    with Interrupt() as noted:
        send(signal.SIGINT)
        now[0] += 0.5  # torchrun passes on what the terminal has sent to everybody
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert noted.signal_number == signal.SIGINT and not left
        now[0] += 2
        send(signal.SIGTERM)
        assert not left
        send(signal.SIGINT)
        assert left == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_two_processes_are_one_with_the_double_batch(config: Path, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {
        **PLAIN,
        "ttt.enabled": True,
        "do_eval": True,
        "max_steps": 6,
        "ckpt_freq": 3,
    }
    overrides["data.cache_dir"] = tmp_path / "codes"
    words = [f"--config={config}", f"--run_dir={tmp_path / 'two'}", "--batch_size=2"]
    output = run_ranks(2, THEN_RUN, *words, "--data.prefetch_steps=2", *options(overrides))
    assert output.count("step 6/6") == 1, "only the first process reports"
    assert "4 a step on 2 x cpu" in output
    train(config, tmp_path / "one", {**overrides, "batch_size": 4})
    for kind in ("train", "eval"):
        expected = logged(tmp_path / "one", kind=kind)
        assert logged(tmp_path / "two", kind=kind) == pytest.approx(expected, abs=1e-5)
    assert set(logged(tmp_path / "one", "encoded_segments")) == {0}, "the two have encoded all"
    norms = [logged(tmp_path / run, "grad_norm") for run in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    # What two have begun, one can finish: here it has nothing left to do but to agree.
    resumed = train(
        config, tmp_path / "two", {**overrides, "batch_size": 4, "max_steps": 8, "resume": True}
    )
    assert resumed.step == 8


@pytest.mark.parametrize(
    ("given", "message"), [({}, "already holds a run"), ({"resume": True}, "no complete check")]
)
def test_what_the_first_process_refuses_all_say_and_nothing_else(
    config: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    """The others were in the middle of an exchange with it, and ended in tracebacks."""
    train(config, tmp_path, {"max_steps": 1, "do_ckpt": False})
    words = [f"--config={config}", f"--run_dir={tmp_path}", *options(given)]
    for program in start_ranks(2, THEN_RUN, *words):
        status, output = finish(program)
        assert status == 1 and "Traceback" not in output, output
        last = output.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last


def test_one_process_of_several_warns_at_the_start(
    config: Path, finished_run: Callable[..., Any], tmp_path: Path
) -> None:
    finished_run(tmp_path)
    # All is done: they say what they would do, and leave.
    others: dict[str, Any] = {"duration_sec": 0.96, "batch_size": 1, "resume": True}
    words = [f"--config={config}", f"--run_dir={tmp_path}", *options(others)]
    output = run_ranks(2, THEN_RUN, *words)
    for caution in (
        "attention sees the whole sequence",
        "batch_size was 2 when the checkpoint was made, and is 1 now",
        "nothing is left to train after 4 steps",
    ):
        assert output.count(caution) == 1, caution


def test_a_signal_to_one_process_of_several_is_the_exit_status_of_all(
    config: Path, tmp_path: Path
) -> None:
    """As a scheduler stops one machine of a run: the others said 128, which is no signal's."""
    words = [f"--config={config}", f"--run_dir={tmp_path}", *ENDLESS, "--ckpt_freq=2"]
    for program in start_ranks(2, STOPPED_AFTER_STEP.format(rank=1, step=3) + THEN_RUN, *words):
        status, output = finish(program)
        assert status == 128 + signal.SIGTERM, output
    assert checkpoint(tmp_path, logged_steps(tmp_path)[-1]).is_dir()


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_once(config: Path, tmp_path: Path) -> None:
    run = torchrun(f"--config={config}", f"--run_dir={tmp_path}", *ENDLESS)
    list(lines_until(run, "step 3/"))
    run.send_signal(signal.SIGTERM)
    _, output = finish(run)
    assert output.count("continue with --resume") == 1
    last = logged_steps(tmp_path)[-1]
    assert checkpoint(tmp_path, last).is_dir()


OFFLINE = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True\n"
"""What it makes of HF_HUB_OFFLINE=1 when it is imported."""


@pytest.mark.parametrize(
    "network",
    [
        None,
        pytest.param({"HF_HUB_OFFLINE": "1"}, marks=pytest.mark.slow),
        # huggingface_hub tries again and again, for 20 s a file.
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),
    ],
    ids=["switched off", "switched off outside", "unreachable"],
)
def test_a_repository_without_network_is_one_clear_message(
    config: Path, tmp_path: Path, network: dict[str, str] | None
) -> None:
    words = [f"--config={config}", f"--run_dir={tmp_path / 'run'}"]
    words += ["--moshi_paths.hf_repo_id=kyutai/no-such-moshi"]
    if network is None:
        status, output = finish(start_program(*words, after=OFFLINE))
    else:
        done = subprocess.run(
            [sys.executable, "train.py", *words],
            cwd=REPOSITORY,
            env={**os.environ, "HF_HOME": str(tmp_path / "hub"), **network},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        status, output = done.returncode, done.stdout
    assert status == 1
    assert "Traceback" not in output and "warning" not in output.lower()
    message = output.strip().splitlines()[-1]
    assert message.startswith("error: moshi_paths.hf_repo_id: 'kyutai/no-such-moshi'")
    assert "network" in message and "set hf_repo_id to its folder" in message


def test_a_mistake_is_one_clear_message(config: Path) -> None:
    status, output = finish(start_program(f"--config={config}", "--ttt.chunk_sise=3"))
    assert status == 1
    assert "Traceback" not in output and "ttt.chunk_size" in output
