"""What must not harm a run: the real program is killed, starved, damaged and started twice."""

import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Program
from training_tools import (
    FULL,
    REPOSITORY,
    assert_same_weights,
    checkpoint,
    finish,
    lines_until,
    logged,
    logged_steps,
    saved_weights,
    start_program,
    start_ranks,
    train,
    trainer,
)

from finetune.checkpoint import list_checkpoints, manifest, step_of
from finetune.checkpoint.run_record import LOCK_NAME
from finetune.distributed.watchdog import EXIT_STATUS
from finetune.errors import UserError
from finetune.kept import FileLock
from finetune.kept import lock as lock_module
from finetune.monitoring import setup_logging

FLOAT32: dict[str, Any] = {**FULL, "param_dtype": "float32"}


def options(**overrides: Any) -> list[Any]:
    return [f"--{key}={value}" for key, value in overrides.items()]


def start(config: Path, run_dir: Path, overrides: dict[str, Any], **kwargs: Any) -> Program:
    return start_program(f"--config={config}", *options(run_dir=run_dir, **overrides), **kwargs)


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_a_run_ends_as_if_it_never_was(
    config: Path, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {**FLOAT32, "max_steps": 400, "ckpt_freq": 3, "resume": "auto"}
    random.seed(0)
    num_killed = num_steps_seen = 0
    while num_killed < 20:
        run = start(config, tmp_path / "killed", {**overrides, "data.num_workers": 0})
        for _ in lines_until(run, "step "):
            pass
        time.sleep(random.uniform(0.0, 1.0))
        os.kill(run.pid, signal.SIGKILL)
        _, output = finish(run)
        num_steps_seen += output.count("step ")
        num_killed += 1
        for path in list_checkpoints(tmp_path / "killed"):
            assert manifest.first_problem(path) is None
    assert num_steps_seen > 20
    # 400 steps take minutes on a machine that others use.
    status, output = finish(start(config, tmp_path / "killed", overrides), timeout_sec=900)
    assert status == 0, output
    train(config, tmp_path / "whole", {**overrides, "resume": False})
    assert logged_steps(tmp_path / "killed") == list(range(1, 401))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert_same_weights(
        saved_weights(tmp_path / "killed", 400), saved_weights(tmp_path / "whole", 400)
    )


SLOW_DISK = """
import runpy, sys, time
from finetune.checkpoint import manifest
describe = manifest.describe
def slowly(folder, files):
    time.sleep(3)
    return describe(folder, files)
manifest.describe = slowly
"""


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written_and_a_signal_waits_for_it(
    config: Path, tmp_path: Path
) -> None:
    run = start(config, tmp_path, {"max_steps": 10000, "ckpt_freq": 2}, after=SLOW_DISK)
    seen = list(lines_until(run, "step 4/"))
    assert not any("saved" in line for line in seen), "step 2 is still being written"
    run.send_signal(signal.SIGTERM)
    status, output = finish(run)
    assert status == 128 + signal.SIGTERM
    last = logged_steps(tmp_path)[-1]
    assert f"stopped after step {last}; continue with --resume" in output
    assert manifest.first_problem(checkpoint(tmp_path, last)) is None
    assert not list((tmp_path / "checkpoints").glob("*.incomplete"))


# --- full and damaged disks -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A disk of its own; a function that sets its size in megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("only root can mount a disk")

    def resize(size_mb: int) -> Path:
        size = f"remount,size={int(1024 * size_mb)}k"
        subprocess.run(["mount", "-o", size, "none", disk], check=True)
        return disk

    yield resize
    subprocess.run(["umount", "--lazy", disk], check=True)


NO_LOOK_BEFORE = """
import runpy, sys
from finetune.checkpoint import writer
writer.SPARE_BYTES = -10**12
"""


@pytest.mark.parametrize(
    "after",
    [pytest.param("", id="noticed before"), pytest.param(NO_LOOK_BEFORE, id="full while writing")],
)
def test_a_full_disk_leaves_the_older_checkpoint_whole_and_the_run_says_so(
    config: Path, tmp_path: Path, small_disk: Callable[..., Any], after: str
) -> None:
    overrides: dict[str, Any] = {**FLOAT32, "max_steps": 6, "ckpt_freq": 2, "num_ckpt_keep": "null"}
    train(config, tmp_path / "whole", overrides)
    size = sum(f.stat().st_size for f in checkpoint(tmp_path / "whole", 2).rglob("*"))
    room_mb = size * 1.5 / 2**20 + (0 if after else 16)
    disk = small_disk(room_mb)
    run_dir = disk / "run"
    status, output = finish(start(config, run_dir, overrides, after=after))
    assert "saved" in output and "Traceback" not in output
    assert re.search(r"checkpoint of step 4 could not be written .*Older checkpoints are", output)
    assert "Training goes on" in output and "step 6/6" in output
    assert status == 1 and output.strip().splitlines()[-1].startswith(
        "error: the checkpoint of step 6 could not be written"
    )
    assert [step_of(path) for path in list_checkpoints(run_dir)] == [2]
    assert len(list((run_dir / "checkpoints").iterdir())) == 1
    assert manifest.first_problem(checkpoint(run_dir, 2)) is None

    small_disk(100)  # the remedy
    train(config, run_dir, {**overrides, "resume": True})
    assert_same_weights(saved_weights(run_dir, 6), saved_weights(tmp_path / "whole", 6))


@pytest.fixture(scope="module")
def saved(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved")
    train(config, run_dir, {**FLOAT32, "ckpt_freq": 2})
    return run_dir


@pytest.mark.parametrize(
    "name",
    [
        "resume/__0_0.distcp",
        "resume/.metadata",
        "resume.pt",
        "consolidated/consolidated.safetensors",
        "info.json",
        "manifest.json",
    ],
)
def test_a_flipped_byte_is_refused_by_name(config: Path, saved: Path, name: str) -> None:
    file = checkpoint(saved, 4) / name
    before = file.read_bytes()
    flipped = bytearray(before)
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=r"checkpoint_000004/.*damaged.*Delete"):
        trainer(config, saved, {**FLOAT32, "resume": True})
    file.write_bytes(before)
    assert trainer(config, saved, {**FLOAT32, "resume": True}).step == 4


def test_retention_does_not_count_what_is_not_whole(config: Path, tmp_path: Path) -> None:
    """Somebody's copy that was cut off looks like the latest checkpoint."""
    overrides: dict[str, Any] = {"max_steps": 8, "ckpt_freq": 2, "num_ckpt_keep": 2}
    train(config, tmp_path, {**overrides, "max_steps": 4})
    torn = checkpoint(tmp_path, 5)
    torn.mkdir()
    (torn / "args.yaml").write_text("")
    with pytest.raises(UserError, match=r"checkpoint_000005/manifest\.json is missing"):
        trainer(config, tmp_path, {**overrides, "resume": True})
    info = json.loads((checkpoint(tmp_path, 4) / "info.json").read_text())
    assert info["step"] == 4


# --- two runs, one folder -------------------------------------------------------------------------


def run_lock(run_dir: Path) -> FileLock:
    return FileLock(run_dir / LOCK_NAME, f"run_dir: {run_dir}", "Stop it.")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(
    config: Path, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"max_steps": 1000000, "ckpt_freq": 1, "data.num_workers": 2}
    first = start(config, tmp_path, overrides)
    list(lines_until(first, "saved"))
    for how in ({"resume": True}, {"overwrite_run_dir": True}):
        status, output = finish(start(config, tmp_path, {**overrides, **how}))
        assert status == 1
        who = f"process {first.pid} on {socket.gethostname()}"
        assert f"error: run_dir: {tmp_path} is in use by {who}" in output
    first.kill()
    finish(first)
    again = start(config, tmp_path, {**overrides, "resume": True})
    assert any("resuming" in line for line in lines_until(again, "step "))
    again.kill()
    finish(again)


def test_a_run_on_another_host_is_noticed_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SEC", 0.2)
    monkeypatch.setattr(lock_module, "WATCH_SEC", 2.0)
    # A file system whose locks do not reach other hosts.
    monkeypatch.setattr(lock_module.fcntl, "lockf", lambda *args: None)
    there = run_lock(tmp_path)
    there.take()
    monkeypatch.setattr(lock_module.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on "):
        run_lock(tmp_path).take()
    there._released.set()  # killed: it says nothing any more
    time.sleep(0.5)
    here = run_lock(tmp_path)
    here.take()
    here.release()


def test_signs_of_life_go_on_after_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a run on another host would take the folder, long after there is room again."""
    monkeypatch.setattr(lock_module, "BEAT_SEC", 0.01)
    setup_logging(0)
    asked = threading.Semaphore(0)
    write = os.pwrite

    with run_lock(tmp_path) as lock:
        lock.take()
        own = lock._file

        def full(descriptor: int, *args: Any) -> int:
            """For this lock alone: what else the process holds finds room."""
            assert own is not None
            if descriptor != own.fileno():
                return write(descriptor, *args)
            asked.release()
            raise OSError(errno.ENOSPC, "disk full")

        with monkeypatch.context() as patch:
            patch.setattr(lock_module.os, "pwrite", full)
            assert asked.acquire(timeout=10) and asked.acquire(timeout=10), "it has given up"
        before = (tmp_path / LOCK_NAME).read_text()
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK_NAME).read_text() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr(lock_module.os, "pwrite", full)
    assert capsys.readouterr().out.count("disk full") <= 2, "once a time"
    assert not lock.is_held


# --- several processes ----------------------------------------------------------------------------


def faulty(config: Path, run_dir: Path, fault: str, **overrides: Any) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            "tests/programs/run_faulty.py",
            f"--config={config}",
            *options(run_dir=run_dir, max_steps=1000000, **overrides),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode != 0
    return done.stdout


def test_a_process_that_dies_is_named_and_ends_the_run(config: Path, tmp_path: Path) -> None:
    code = "import runpy; runpy.run_path('tests/programs/run_faulty.py')"
    overrides: dict[str, Any] = {"run_dir": tmp_path, "max_steps": 1000000}
    words = options(**overrides, **{"parallel.shard_size": 2})
    first, second = start_ranks(2, code, f"--config={config}", *words, FAULT="dies 1 4")
    status, output = finish(first)
    assert finish(second)[0] == -signal.SIGKILL and status == EXIT_STATUS
    assert re.search(
        r"error: rank 1 \(process \d+ on .*\) is dead, or cannot be reached: no sign of life for "
        r"\d+ s; it was last seen in step \d+: .*\. The run ends",
        output,
    ), output


@pytest.mark.slow
def test_a_process_that_fails_is_named_and_ends_the_run(config: Path, tmp_path: Path) -> None:
    output = faulty(config, tmp_path, "raises 1 4")
    assert re.search(r"rank 1 \(.*\) has ended in step 4: data: ValueError: a mistake", output), (
        output
    )


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_its_place(config: Path, tmp_path: Path) -> None:
    output = faulty(config, tmp_path, "hangs 1 4", **{"parallel.hang_timeout_sec": 5})
    assert re.search(
        r"error: rank 1 \(process \d+ on .*\) hangs: for \d+ s it has been in step 4: data, and "
        r"the others wait for it in step 4: forward and backward",
        output,
    ), output
    assert "run_faulty.py" in output, "the stack of the process that hangs"
