"""A run that cannot fit is refused before its model is made, with what to change."""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan import ALL_WEIGHTS, MOSHI
from training_tools import FULL, LORA, logged_steps

from finetune.checkpoint import checkpoint_bytes
from finetune.cli import COMMANDS
from finetune.command_line import call
from finetune.config import load_config
from finetune.config.args import TrainArgs
from finetune.distributed import World
from finetune.errors import UserError
from finetune.model import find_checkpoint, plan_model
from finetune.plan import estimate, explained, room
from finetune.plan.available import Place, host_places
from ttt import TTTArgs

CPU = World(0, 1, torch.device("cpu"))
GB = 1e9


@pytest.fixture
def memory_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the host has, and what the GPU, in GB."""

    def there(host_gb: float, gpu_gb: float = 0.0) -> None:
        place = Place("host", "the memory of here", host_gb * GB)
        monkeypatch.setattr(room, "host_places", lambda: [place])
        gpu = Place("gpu", "cuda:0", gpu_gb * GB)
        monkeypatch.setattr(room, "device_place", lambda device: gpu)

    return there


@pytest.fixture
def starts(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Any]:
    """`moshi-ttt train` in this process: its status, and what it printed."""

    def start(*words: Any) -> tuple[int, str]:
        given = ["moshi-ttt", "train", str(config), f"--run_dir={tmp_path / 'run'}", *words]
        monkeypatch.setattr(sys, "argv", given)
        status = call(COMMANDS, name="moshi-ttt")
        return status, "".join(capsys.readouterr())

    return start


# --- the command ----------------------------------------------------------------------------------

HUGE = ("--batch_size=65536", "--duration_sec=86400")


@pytest.fixture
def makes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was being made")

    monkeypatch.setattr("finetune.model.build.fill", fill)


def test_a_run_that_no_host_can_hold_is_one_message_at_once(
    starts: Callable[..., Any], tmp_path: Path, makes_no_model: None
) -> None:
    started_at = time.monotonic()
    status, said = starts(*HUGE)
    assert time.monotonic() - started_at < 5
    assert status == 1 and "Traceback" not in said
    assert said.count("error: ") == 1 and "this run cannot fit into" in said
    for key in ("batch_size", "duration_sec", "--force"):
        assert key in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_just_does_not_fit_is_told_what_does(
    starts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    memory_of: Callable[..., None],
    makes_no_model: None,
) -> None:
    monkeypatch.setattr(room, "SMALL_BYTES", 0)
    memory_of(host_gb=0.5)
    status, said = starts(*map("--{0[0]}={0[1]}".format, LORA.items()), "--batch_size=8192")
    assert status == 1
    assert "0.5 GB are free, and it takes for training at least 0.7 GB" in said
    assert "batch_size: 4096 with num_microbatches: 2: 0.5 GB" in said, said
    assert "shard_size" not in said, "there are no GPUs to spread over"


def test_where_nothing_is_enough_the_least_is_said(
    starts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    memory_of: Callable[..., None],
    makes_no_model: None,
) -> None:
    monkeypatch.setattr(room, "SMALL_BYTES", 0)
    memory_of(host_gb=0.0)
    status, said = starts("--gradient_checkpointing=true")
    assert status == 1 and "Change one of" not in said
    assert re.search(r"Here no change is enough, nor all together: at the least it takes", said)
    # What is in force already is not proposed again.
    assert "gradient_checkpointing" not in said.partition("Here")[2]


def test_adapters_beyond_reason_are_told_to_be_smaller(
    starts: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    memory_of: Callable[..., None],
    makes_no_model: None,
) -> None:
    monkeypatch.setattr(room, "SMALL_BYTES", 0)
    memory_of(host_gb=0.1)
    status, said = starts("--lora.enable=true", "--lora.rank=65536")
    assert status == 1 and re.search(r"lora\.rank: \d+: 0\.\d GB", said), said


def test_force_goes_on_with_a_warning(
    starts: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory_of: Callable[..., None],
) -> None:
    monkeypatch.setattr(room, "SMALL_BYTES", 0)
    memory_of(host_gb=0.0)
    status, said = starts()
    assert status == 1 and "--force" in said
    status, said = starts("--force")
    assert status == 0, said
    assert said.count("cannot fit into the memory of here") == 1 and "warning" in said
    assert logged_steps(tmp_path / "run") == [1, 2, 3, 4]


def test_force_is_no_key_of_a_file(
    starts: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "forced.yaml"
    path.write_text(f"{config.read_text()}force: true\n")
    with pytest.raises(UserError, match="force: unknown key"):
        load_config(path)


def test_a_small_run_is_never_refused(
    starts: Callable[..., Any], memory_of: Callable[..., None], tmp_path: Path
) -> None:
    memory_of(host_gb=0.0)
    status, said = starts("--max_steps=1")
    assert status == 0, said
    assert "cannot fit" not in said


# --- what is compared -----------------------------------------------------------------------------


def checked(args: TrainArgs, world: World = CPU) -> None:
    info = find_checkpoint(args.moshi_paths) if args.moshi_paths.hf_repo_id else room_info()
    model = plan_model(args, info)
    room.require_room(args, info, model, world, *checkpoint_bytes(args, model, world))


def room_info() -> Any:
    from finetune.plan.plan import shape_of

    return shape_of(MOSHI.moshi_paths)[0]


def problem(args: TrainArgs, world: World = CPU) -> str:
    with pytest.raises(UserError) as error:
        checked(args, world)
    return str(error.value)


GPU = World(0, 1, torch.device("cuda", 0))


def test_moshi_on_a_gpu(memory_of: Callable[..., None]) -> None:
    off = dataclasses.replace(MOSHI, ttt=TTTArgs())
    memory_of(host_gb=100, gpu_gb=34.7)  # what it took when it was measured
    checked(off, GPU)
    memory_of(host_gb=100, gpu_gb=26)
    said = problem(off, GPU)
    assert "cannot fit into cuda:0: 26.0 GB are free" in said
    smaller = re.search(r"batch_size: (\d+) with num_microbatches: (\d+): ([\d.]+) GB", said)
    assert smaller is not None
    assert int(smaller[1]) * int(smaller[2]) == 16 and float(smaller[3]) <= 26
    assert "duration_sec: " in said and "parallel.shard_size: 4" in said
    memory_of(host_gb=100, gpu_gb=79)
    said = problem(dataclasses.replace(off, **ALL_WEIGHTS), GPU)
    assert "lora.enable: true" in said and "optimizer 61.5" in said


def test_the_host_of_a_gpu_holds_a_checkpoint(memory_of: Callable[..., None]) -> None:
    """While it is written, all weights and the optimizer's state: as docs/distributed.md has it."""
    args = dataclasses.replace(MOSHI, ttt=TTTArgs(), **ALL_WEIGHTS)
    memory_of(host_gb=107, gpu_gb=200)
    said = problem(args, GPU)
    assert "the memory of here: 107.0 GB are free" in said
    assert "the copy of a checkpoint 107.6 GB" in said
    assert "ckpt_async: false" in said and "do_ckpt: false" in said and "batch_size" not in said
    checked(dataclasses.replace(args, ckpt_async=False), GPU)
    memory_of(host_gb=1, gpu_gb=200)
    checked(dataclasses.replace(args, do_ckpt=False), GPU)


@dataclasses.dataclass(frozen=True)
class Several(World):
    """As if every process had found the same."""

    def gather(self, thing: Any) -> list[Any]:
        return [thing] * self.size


def test_processes_of_one_host_share_its_memory(
    config: Path, memory_of: Callable[..., None]
) -> None:
    args = load_config(config, FULL | {"batch_size": 65536})
    info = find_checkpoint(args.moshi_paths)
    needed = room.at_least(estimate(args, plan_model(args, info), 1))
    assert needed > room.SMALL_BYTES
    memory_of(host_gb=1.5 * needed / GB)
    checked(args)
    alone = dataclasses.replace(args.parallel, shard_size=1)
    args = dataclasses.replace(args, parallel=alone)
    said = problem(args, Several(0, 2, torch.device("cpu")))
    assert "2 processes take for training" in said and "estimated each" in said


@pytest.mark.parametrize("kind", [FULL, LORA], ids=["full", "lora"])
def test_what_is_certain_is_below_the_estimate(config: Path, kind: dict[str, Any]) -> None:
    for changes in ({}, {"batch_size": 1, "duration_sec": 0.08}, {"batch_size": 512}):
        args = load_config(config, kind | changes)
        memory = estimate(args, plan_model(args, find_checkpoint(args.moshi_paths)), 1)
        known = memory.weights + 1.5 * memory.optimizer
        assert known <= room.at_least(memory) <= max(known, memory.peak)


@pytest.mark.parametrize(
    ("changes", "trains", "is_named"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"gradient_checkpointing": "selective"}, True, False),
        ({"ttt": dataclasses.replace(MOSHI.ttt, keep_writes=False)}, True, False),
        ({"ttt": dataclasses.replace(MOSHI.ttt, write="sum")}, True, False),
        ({"ttt": TTTArgs()}, True, False),
    ],
    ids=["delta", "evaluation", "selective", "not kept", "sum", "off"],
)
def test_a_gpu_that_is_full_is_told_of_what_chunks_write(
    changes: dict[str, Any], trains: bool, is_named: bool
) -> None:
    """Where it is kept, and there alone; beside what comes before it."""
    args = dataclasses.replace(MOSHI, **changes)
    with pytest.raises(UserError) as caught, explained(args, CPU.device, "step 3", trains=trains):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    said = str(caught.value)
    assert "a smaller batch_size (now 16)" in said
    assert ("; ttt.keep_writes: false; a shorter" in said) is is_named
    assert ("keep_writes" in said) is is_named


# --- what is there --------------------------------------------------------------------------------


def write(folder: Path, **files: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo="MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\nHugePages_Total: 0\n")
    write(proc / "self", cgroup="0::/job/task\n")
    return proc, cgroups


def free_gb(system: tuple[Path, Path]) -> list[Any]:
    return [place.free_bytes / GB for place in host_places(*system)]


def test_the_memory_of_this_host() -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux says so")
    host, *_ = host_places()
    assert 1e8 < host.free_bytes < 1e14


def test_a_host_without_limits(system: tuple[Path, Path]) -> None:
    assert free_gb(system) == [4.096]
    assert host_places(system[0] / "nowhere", system[1]) == []


def test_limits_of_control_groups(system: tuple[Path, Path]) -> None:
    _, cgroups = system
    stat = "anon 7\ninactive_file 100000000\nactive_file 200000000\n"
    task: dict[str, Any] = {"memory.max": "max\n", "memory.current": "5", "memory.stat": stat}
    job: dict[str, Any] = {
        "memory.max": "2000000000\n",
        "memory.current": "900000000\n",
        "memory.stat": stat,
    }
    write(cgroups / "job/task", **task)
    write(cgroups / "job", **job)
    assert free_gb(system) == [4.096, 1.4]
    write(cgroups / "job/task", **task | {"memory.max": "100\n", "memory.current": "999999999999"})
    assert free_gb(system) == [4.096, 0.0, 1.4]
    assert len({place.key for place in host_places(*system)}) == 3


def test_limits_of_control_groups_of_the_first_version(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    write(proc / "self", cgroup="5:cpu,cpuacct:/x\n4:memory:/of/the/host\n1:name=systemd:/\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 100000000\ntotal_active_file 0\n"
    files: dict[str, Any] = {
        "memory.limit_in_bytes": "1000000000",
        "memory.usage_in_bytes": "300000000",
    }
    # In a container its own group is seen as the root of all.
    write(cgroups / "memory", **files, **{"memory.stat": stat})
    assert free_gb(system) == [4.096, 0.8]
