"""What no run of a sweep can do on this machine is said before the first, and once."""

import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sweep_tools
import torch
from sweep_tools import COMMON, sweep
from training_tools import LORA

# Fixtures: pytest finds them by their names in this module.
write = sweep_tools.write
commands = sweep_tools.commands

LACKS: dict[str, tuple[dict[str, Any], str]] = {
    "a GPU": ({"device": "cuda"}, "device: cuda, and PyTorch sees no GPU here"),
    "float32": (
        {"compile": True, "param_dtype": "bfloat16"},
        "on a CPU needs param_dtype: float",
    ),
    "bitsandbytes": (
        {**LORA, "full_finetuning": False, "base_precision": "nf4"},
        "base_precision: nf4 needs the package bitsandbytes, which is not installed here",
    ),
    "moments": (
        {"optim.state": "int8", "parallel.shard_size": 1},
        "optim.state: int8 needs the package bitsandbytes, which is not installed here",
    ),
    "wandb": ({"wandb.project": "mine"}, "the package wandb is not installed"),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_no_run_can_do_here_is_said_once_and_before_the_first(
    write: Callable[..., Any],
    commands: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest),
    )
    changes, message = LACKS[what]
    path = write({"a": {"seed": 1}, "b": {"seed": 2}}, overrides=COMMON | changes)
    assert sweep(path) == 1 and not commands
    said = capsys.readouterr().err
    assert said.count(message) == 1 and "all runs: " in said
    assert not (path.parent / "sweep").exists()

    path = write({"a": {"seed": 1}, "b": changes})
    assert sweep(path) == 1 and not commands
    said = capsys.readouterr().err
    assert said.count(message) == 1 and re.search(rf"\bb: .*{re.escape(message)}", said)
    assert sweep(path, "--slurm") == 0, "another machine may have it"


def test_what_is_finished_needs_no_gpu_any_more(
    write: Callable[..., Any], commands: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = write({"a": None, "b": {"device": "cuda"}})
    assert sweep(path) == 1 and not commands
    assert sweep(path, "--only=a") == 0 and len(commands) == 1
    path = write({"a": {"device": "cuda"}, "b": {"seed": 1}})
    assert sweep(path) == 0 and len(commands) == 2
    assert sweep(path, "--table") == 0


@pytest.mark.parametrize("words", [[], ["--slurm"]])
def test_processes_that_cannot_be_divided_are_said_on_any_machine(
    write: Callable[..., Any],
    commands: list[Any],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    path = write({"a": None, "b": {"parallel.shard_size": 2}}, processes=3)
    assert sweep(path, *words) == 1 and not commands
    said = capsys.readouterr().err
    assert "b: parallel.shard_size: 3 processes cannot be divided into groups of 2" in said


def test_more_processes_than_gpus_are_said_before_the_first_run(
    write: Callable[..., Any],
    commands: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    path = write({"a": None, "b": None}, processes=3, overrides=COMMON | {"device": "auto"})
    assert sweep(path) == 1 and not commands
    said = capsys.readouterr().err
    assert said.count("device: this host has 2 CUDA devices, and process 2 of it needs one.") == 1
