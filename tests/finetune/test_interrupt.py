"""Ctrl-C where an exception would be lost, or a second one would break what the first has begun:
in imports, in what C code calls, in clearing up, and while Python ends."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import COMMAND, Program

from finetune.interrupt import Stopped, ending_on_signals

ROOT = Path(__file__).parents[2]
LOSES_EXCEPTIONS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
except BaseException:
    pass  # as C code does that asks whether there is a module
for _ in range({rounds}):
    time.sleep(0.05)
is_whole = True
"""


def module(folder: Path, name: str, rounds: int) -> None:
    (folder / f"{name}.py").write_text(LOSES_EXCEPTIONS.format(rounds=rounds))


@pytest.mark.parametrize("rounds", [0, 6])
def test_it_waits_for_the_import_and_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    module(tmp_path, f"loses_{rounds}", rounds)
    monkeypatch.syspath_prepend(tmp_path)
    alarm = signal.getsignal(signal.SIGALRM)
    imported = None
    with pytest.raises(Stopped) as stopped, ending_on_signals():
        imported = importlib.import_module(f"loses_{rounds}")
        time.sleep(10)
    assert imported is not None and imported.is_whole
    assert stopped.value.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGALRM) is alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


STOPPED_AT = """
import runpy, signal, sys
class Stop:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)
# A shell that runs the tests in the background has the signal ignored, and so its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Stop())
sys.path.insert(0, "")
runpy.run_path(sys.argv[2], run_name="__main__")
"""


@pytest.mark.parametrize("program", ["finetune/__main__.py", "finetune/cli.py", "train.py"])
@pytest.mark.parametrize("module", ["finetune.command_line", "finetune.config.args"])
def test_the_first_imports_end_by_a_message(program: str, module: str) -> None:
    words = [sys.executable, "-c", STOPPED_AT, module, program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "\nstopped by SIGINT\n")


@pytest.mark.parametrize("name", ["finetune", "finetune.cli"])
def test_a_module_is_the_program(name: str) -> None:
    words = [sys.executable, "-m", name, "config", "optim.lrr"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Did you mean optim.lr?" in done.stderr


def test_a_second_one_does_not_wait(tmp_path: Path) -> None:
    module(tmp_path, "endless", 10**6)
    program = "from finetune.interrupt import ending_on_signals\nwith ending_on_signals():\n"
    program += "    print('ready', flush=True)\n    import endless"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, **pipes)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while run.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
        run.send_signal(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT
    assert run.stderr is not None and run.stderr.read() == "\nstopped by SIGINT\n"


SPEAKS = """
import signal
from finetune.spoken import speech
class Types:
    def __getattr__(self, name):
        return getattr(speech_types, name)
    def string_at(self, *arguments):
        global blocks
        blocks += 1
        if blocks == 40:
            signal.raise_signal(signal.SIGINT)
        return speech_types.string_at(*arguments)
blocks = 0
speech_types = speech.ctypes
speech.ctypes = Types()
"""
"""Ctrl-C while espeak hands over what it has spoken, where it came in four of nine tries."""


@pytest.mark.parametrize("command", [["demo-data", "--out"], ["recall-audio"]])
def test_it_ends_a_command_that_speaks(tmp_path: Path, command: list[str]) -> None:
    program = Program(SPEAKS + COMMAND, *command, tmp_path / "out")
    output, _ = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT" in output and "Traceback" not in output, output
    assert not any(tmp_path.iterdir())


class Closes:
    """What Python calls by itself, and whose exceptions it ignores."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_it_is_not_lost_where_python_ignores_exceptions(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    with pytest.raises(Stopped), ending_on_signals():
        Closes()
        time.sleep(10)
    assert sys.unraisablehook is hook and "ignored" not in capfd.readouterr().err


def test_a_second_one_close_by_does_not_disturb_the_clearing_up() -> None:
    is_clear = False
    with pytest.raises(Stopped), ending_on_signals():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            is_clear = True
    assert is_clear


CLEARS_UP = """
from finetune.interrupt import ending_on_signals
with ending_on_signals():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("clears up", flush=True)
        time.sleep(60)
"""


def test_a_second_one_ends_a_clearing_up_that_hangs() -> None:
    program = Program(f"import time\n{CLEARS_UP}")
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "clears up\n"
    time.sleep(1.1)
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=30)
    assert (program.returncode, output) == (128 + signal.SIGINT, "\nstopped by SIGINT\n")


PRESSED_AT_EXIT = """
import atexit, os, signal
import finetune.cli
# Forked from a test that a shell runs in the background, it has the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(*_):
    signal.raise_signal(signal.SIGINT)
class Late:
    def __del__(self, kill=os.kill, arguments=(os.getpid(), signal.SIGINT)):
        kill(*arguments)
def command(*words):
    if WHEN == "at exit":
        atexit.register(press)
    else:
        signal.late = Late()  # a module that is taken apart at the very end
    if IS_SECOND:
        press()
finetune.cli.COMMANDS["config"] = command
"""


@pytest.mark.parametrize("when", ["at exit", "taken apart"])
@pytest.mark.parametrize("is_second", [True, False])
def test_one_while_python_ends_is_no_traceback(when: str, is_second: bool) -> None:
    """The second of two came there, in what torch clears up; a later one took the place of the
    exit status."""
    told = f"WHEN, IS_SECOND = {when!r}, {is_second}\n"
    program = Program(told + PRESSED_AT_EXIT + COMMAND, "config")
    output, _ = program.communicate(timeout=60)
    # Before Python takes itself apart, it ends what may hang.
    is_stopped = is_second or when == "at exit"
    assert program.returncode == (128 + signal.SIGINT if is_stopped else 0), output
    assert output == ("\nstopped by SIGINT\n" if is_second else "")
