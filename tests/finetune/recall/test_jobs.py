"""What becomes of the workers when the command that started them ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from pathlib import Path

from finetune.interrupt import ending_on_signals
from finetune.recall.jobs import Job, run_jobs


def work(path):
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    time.sleep(600)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    jobs = [Job(name, {}, work, (out / f"{name}.pid",)) for name in ("one", "two")]
    with ending_on_signals():
        run_jobs(jobs, out, workers=2)
"""


def is_alive(pid: int) -> bool:
    try:
        # One that nobody has waited for yet is gone too.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_workers_end_with_their_command(tmp_path: Path, number: signal.Signals) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = [tmp_path / "one.pid", tmp_path / "two.pid"]
    # Not in the group of this process, as from a scheduler: the signal reaches the command alone.
    command = subprocess.Popen(
        [sys.executable, program, tmp_path], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until = time.monotonic() + 120
        while not all(path.exists() for path in paths):
            assert command.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        workers = [int(path.read_text()) for path in paths]
        assert all(map(is_alive, workers))
        command.send_signal(number)
        command.wait(60)
        until = time.monotonic() + 20
        while any(map(is_alive, workers)):
            assert time.monotonic() < until, "workers go on"
            time.sleep(0.1)
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
