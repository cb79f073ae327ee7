"""Two processes with a GPU each, that talk through NCCL: `python -m pytest -m gpu`."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import (
    FULL,
    LORA,
    checkpoint,
    finish,
    lines_until,
    logged,
    logged_steps,
    run_cases,
    torchrun,
    train,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
COMMON: dict[str, Any] = {
    "device": "cuda",
    "param_dtype": "float32",
    "optim.lr": 1e-3,
    "optim.ttt_lr": 1e-3,
    "do_eval": True,
    "compile": False,
}
SHARDED: dict[str, Any] = {"parallel.shard_size": 2}
LINEAR: dict[str, Any] = {"ttt.method": "linear", "ttt.mini_batch_size": 5}
CASES: dict[str, Any] = {
    "lora, replicas": {**LORA, "ttt.write": "delta"},
    "lora, delta": {**LORA, **SHARDED, "ttt.write": "delta", "num_microbatches": 2},
    "full, compiled": {**FULL, **SHARDED, "gradient_checkpointing": True, "compile": True},
    "full, linear": {**FULL, **SHARDED, **LINEAR, "gradient_checkpointing": "selective"},
    "full, mlp": {**FULL, **SHARDED, **LINEAR, "ttt.method": "mlp"},
    "full, bfloat16": {**FULL, **SHARDED, "param_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_gpus")


@pytest.fixture(scope="module")
def two(folder: Path, config: Path) -> Path:
    run_cases(
        folder,
        config,
        2,
        {
            folder / name: {**COMMON, "data.cache_dir": str(folder / "codes"), **o, "batch_size": 2}
            for name, o in CASES.items()
        },
    )
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_are_one(config: Path, tmp_path: Path, two: Path, name: str) -> None:
    """From codes that the two have made."""
    overrides: dict[str, Any] = {**COMMON, "data.cache_dir": str(two / "codes"), **CASES[name]}
    alone: dict[str, Any] = {"batch_size": 4, "parallel.shard_size": 1, "compile": False}
    train(config, tmp_path, {**overrides, **alone})
    is_exact = overrides["param_dtype"] == "float32"
    for kind in ("train", "eval"):
        found, expected = logged(two / name, kind=kind), logged(tmp_path, kind=kind)
        assert found == pytest.approx(expected, abs=1e-4 if is_exact else 2e-2)
    norms = [logged(run, "grad_norm") for run in (two / name, tmp_path)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3 if is_exact else 5e-2)


@pytest.mark.parametrize("kind", [LORA, FULL], ids=["lora", "full"])
def test_a_signal_saves_and_the_run_goes_on(
    config: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    overrides: dict[str, Any] = {
        **kind,
        **SHARDED,
        "device": "cuda",
        "compile": False,
        "ckpt_freq": 2,
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    arguments += [f"--config={config}", f"--run_dir={tmp_path}", "--max_steps=1000000"]
    run = torchrun(*arguments)
    list(lines_until(run, "step 3/"))
    run.send_signal(signal.SIGTERM)
    _, output = finish(run)
    last = logged_steps(tmp_path)[-1]
    assert checkpoint(tmp_path, last).is_dir(), output

    again = torchrun(*arguments, "--resume")
    lines = list(lines_until(again, f"step {last + 3}/"))
    again.send_signal(signal.SIGTERM)
    finish(again)
    assert any(f"checkpoint_{last:06d} after step {last}" in line for line in lines), lines
    steps = logged_steps(tmp_path)
    assert steps == list(range(1, steps[-1] + 1))
