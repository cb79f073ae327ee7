"""Ctrl-C in a sweep: what it says, what it saves, and how the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_tools
from forked import COMMAND, Program
from sweep_tools import sweep
from training_tools import checkpoint, logged_steps

from finetune.errors import UserError
from finetune.sweep import run as sweep_run
from finetune.sweep.plan import load_sweep
from finetune.sweep.record import read_record
from finetune.sweep.run import Children

# Fixtures: pytest finds them by their names in this module.
write = sweep_tools.write


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


SAVES_UNTIL_TOLD = """
import signal, sys, time
from pathlib import Path
def save(*_):
    for _ in range(6000):
        if Path(sys.argv[1]).exists():
            sys.exit(130)
        time.sleep(0.01)
    sys.exit("nothing was said in a minute")
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_ctrl_c_is_answered_while_the_run_still_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen, said = tmp_path / "one.log", tmp_path / "seen", []

    def say(text: str) -> None:
        said.append(text)
        seen.touch()

    monkeypatch.setattr(sweep_run, "_say", say)

    def press() -> None:
        while "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with log.open("w") as file, Children() as children:
        threading.Thread(target=press).start()
        command = [sys.executable, "-c", SAVES_UNTIL_TOLD, str(seen)]
        assert children.run(command, file, "[1/2] one", dict(os.environ)) == 130
    assert said == [
        "[1/2] one: SIGINT: finishing this step, then saving. Ctrl-C (again) leaves at once."
    ]
