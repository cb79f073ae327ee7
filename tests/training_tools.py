"""A tiny checkpoint in the layout of Moshi's repositories, data for it, and runs on them."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from data_tools import MIMI_CONFIG, tiny_mimi, tiny_tokenizer, write_dataset
from forked import Program
from helpers import moshi_like
from moshi.models.lm import LMModel
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from finetune.checkpoint import manifest
from finetune.config import load_config
from finetune.monitoring import Kind, metrics_path, read_metrics
from finetune.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent
LM_CONFIG = moshi_like(text_card=40, card=32, num_layers=2)
FILE_NAMES = {
    "model_type": "moshi",
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}
# Of segments of 2 s some are complete, and the others mostly zero tokens.
TRAIN_DURATIONS_SEC = [2.0, 0.7, 2.5, 1.3, 2.0, 0.4]
EVAL_DURATIONS_SEC = [2.0, 0.5, 1.6]

PLAIN = {"ttt.enabled": False, "full_finetuning": True, "param_dtype": "float32"}
"""Overrides: no TTT, no LoRA, nothing rounded."""
FULL = {"full_finetuning": True}
LORA = {"lora.enable": True, "lora.rank": 2}


def write_model(folder: Path, **overrides: Any) -> Path:
    """A checkpoint with random float32 weights of stock `moshi`'s own making."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LM_CONFIG | overrides
    torch.manual_seed(0)
    model = LMModel(device="cpu", dtype=torch.float32, **config)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file(tiny_mimi().state_dict(), folder / "mimi.safetensors")
    (folder / "config.json").write_text(json.dumps(FILE_NAMES | config))
    (folder / "mimi_config.json").write_text(json.dumps(MIMI_CONFIG))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().serialized_model_proto())
    return folder


def write_config(folder: Path) -> Path:
    """A model, data and a configuration for both: TTT alone, on bfloat16 parameters."""
    write_dataset(folder / "train", TRAIN_DURATIONS_SEC)
    write_dataset(folder / "eval", EVAL_DURATIONS_SEC, seed=50)
    config = {
        "moshi_paths": {"hf_repo_id": str(write_model(folder / "model"))},
        "data": {
            "train_data": str(folder / "train/all.jsonl"),
            "eval_data": str(folder / "eval/all.jsonl"),
            "shuffle": True,
            "num_workers": 0,
            "cache_dir": str(folder / "codes"),
        },
        "run_dir": str(folder / "run"),
        "ttt": {
            "enabled": True,
            "start_layer": 0,
            "layer_frequency": 1,
            "chunk_size": 5,
            "write": "sum",
            "learning_rate": 1,
        },
        "duration_sec": 2,
        "batch_size": 2,
        "max_steps": 4,
        "optim": {"lr": 3e-3, "ttt_lr": 3e-3, "pct_start": 0.3},
        "gradient_checkpointing": False,
        "device": "cpu",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


_assembled: list[Trainer] = []


def trainer(config: Path, run_dir: Path, overrides: dict[str, Any] | None = None) -> Trainer:
    """A run that is assembled, and has its folder until it has trained or the test ends."""
    run = Trainer(load_config(config, {"run_dir": str(run_dir), **(overrides or {})}))
    _assembled.append(run)
    return run


def leave_folders() -> None:
    """Let go of the folders of runs that have not trained: their signs of life would go on."""
    while _assembled:
        with _assembled.pop().folder:
            pass


def train(config: Path, run_dir: Path, overrides: dict[str, Any] | None = None) -> Trainer:
    """A run to its last step; its trainer, for the model in it."""
    run = trainer(config, run_dir, overrides)
    assert run.train() == 0
    return run


def stop_after(run: Trainer, step: int) -> None:
    """Ends a run as `kill -9` would after this step: nothing is saved, nothing is said."""
    log = run.log

    def log_and_die(*args: Any, **kwargs: Any) -> None:
        log(*args, **kwargs)
        if run.step == step:
            raise KeyboardInterrupt

    run.log = log_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()


def logged(run_dir: Path, name: str = "loss", kind: Kind = "train") -> list[float]:
    """One metric of every logged step."""
    return [record[name] for record in read_metrics(metrics_path(run_dir, kind))]


def logged_steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(metrics_path(run_dir, "train"))]


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"checkpoint_{step:06d}"


def saved_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All trained weights of a checkpoint, and the float32 ones that the optimizer keeps."""
    folder = checkpoint(run_dir, step)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "consolidated").glob("*.safetensors")):
        weights |= load_file(file)
    reader = dcp.FileSystemReader(folder / "resume")
    found = reader.read_metadata().state_dict_metadata
    masters = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if name.startswith("master/") and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(masters, storage_reader=reader, no_dist=True)
    return weights | masters


def sign(saved: Path) -> None:
    """Give a checkpoint a manifest that fits, as whoever made the folder would make it."""
    (saved / manifest.NAME).unlink(missing_ok=True)
    files = [path for path in saved.rglob("*") if path.is_file()]
    manifest.write(saved, manifest.describe(saved, files))


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def random_batch(*, batch: int = 2, num_frames: int = 25, seed: int = 0) -> torch.Tensor:
    """Codes for the tiny model, [batch, 9, num_frames]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32, (batch, 9, num_frames), generator=generator)


# --- the program ----------------------------------------------------------------------------------

KILLED_AFTER_STEP = """
import os, runpy, signal, sys
from finetune.trainer import Trainer
log = Trainer.log
def log_and_die(self, *args, **kwargs):
    log(self, *args, **kwargs)
    if self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.log = log_and_die
"""
STOPPED_AFTER_STEP = """
import os, runpy, signal, sys
from finetune.trainer import Trainer
log = Trainer.log
def log_and_stop(self, *args, **kwargs):
    log(self, *args, **kwargs)
    if self.world.rank == {rank} and self.step == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer.log = log_and_stop
"""
HANGS_WHILE_SAVING = """
import runpy, sys, time
from finetune.trainer import Trainer
def hang(self):
    print("saving", flush=True)
    time.sleep(600)
Trainer.save = hang
"""
THEN_RUN = "import sys, runpy; sys.argv[0] = 'train.py'; " + (
    "runpy.run_path('train.py', run_name='__main__')"
)


def start_program(
    *arguments: str | Path, after: str = "", environment: dict[str, str] | None = None
) -> Program:
    """`train.py` as a user starts it, on one thread and in a process group of its own.

    `after` is code that runs first, in the same process: what the test does to the program.
    """
    return Program(after + THEN_RUN, *arguments, environment=environment)


def torchrun(*arguments: str) -> "subprocess.Popen[str]":
    """`train.py` in two processes on this machine."""
    two = ("--standalone", "--nproc-per-node=2")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *two, "train.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_cases(
    folder: Path,
    config: Path,
    num_processes: int,
    cases: dict[Path, dict[str, Any]],
    *,
    with_toy_dimension: Container[Path] = (),
) -> str:
    """Runs `cases` (overrides by run folder) in processes of their own; what they print.

    Args:
        with_toy_dimension: the cases in which each two neighbors are to read the same data.
    """
    file = folder / f"cases_{num_processes}.json"
    file.write_text(
        json.dumps(
            [
                {
                    "config": str(config),
                    "overrides": {"run_dir": str(run_dir), **overrides},
                    "has_toy_dimension": run_dir in with_toy_dimension,
                }
                for run_dir, overrides in cases.items()
            ]
        )
    )
    code = "import sys, run_cases; run_cases.main(sys.argv[1])"
    return run_ranks(num_processes, code, file)


_PORTS = itertools.count(20_000 + os.getpid() % 1000 * 10)
"""Below those that the system gives to whoever asks for any: nobody takes one before the first
process does. Tests run in processes of their own, with numbers of their own."""


def _free_port() -> int:
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("unreachable")


def start_ranks(
    num_processes: int, code: str, *arguments: str | Path, **environment: str
) -> list[Program]:
    """Start `code` in processes that know of each other as those of `torchrun` do, which would have
    each import everything."""
    port = _free_port()
    programs = []
    for rank in range(num_processes):
        variables: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
        variables |= {"LOCAL_WORLD_SIZE": num_processes}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = environment | {name: str(value) for name, value in variables.items()}
        programs.append(Program(code, *arguments, environment=own))
    return programs


def run_ranks(num_processes: int, code: str, *arguments: str | Path) -> str:
    """Runs `code` in processes that know of each other; what they print."""
    programs = start_ranks(num_processes, code, *arguments)

    def output_of(program: Program) -> str:
        """Return what it printed. The others wait for one that has died: they end with it."""
        try:
            output, _ = program.communicate(timeout=300)
            return output
        finally:
            if program.returncode != 0:
                for each in programs:
                    with suppress(ProcessLookupError):
                        os.kill(each.pid, signal.SIGKILL)

    with ThreadPoolExecutor(num_processes) as threads:
        outputs = [*threads.map(output_of, programs)]
    assert not any(program.returncode for program in programs), "\n".join(outputs)
    return "".join(outputs)


def finish(
    process: "Program | subprocess.Popen[str]", *, timeout_sec: float = 120
) -> tuple[int, str]:
    """The exit status of a program, and what it has printed since it was last read."""
    output, _ = process.communicate(timeout=timeout_sec)
    return process.wait(), output


def lines_until(process: "Program | subprocess.Popen[str]", text: str) -> Iterator[str]:
    """The lines that a program prints, up to and with the first that has `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if text in line:
            return
    raise AssertionError(f"the program ended without {text!r}")
