"""Tests of Triton kernels run on a CUDA device, or, interpreted, on a CPU."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this variable when it is imported: it cannot be changed later."""
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_a_device(test: Any) -> Any:
    """Mark a test that runs kernels on `DEVICE`."""
    missing = not INTERPRETED and not torch.cuda.is_available()
    skip = pytest.mark.skipif(missing, reason="needs a CUDA device, or Triton's interpreter")
    return pytest.mark.gpu(skip(test))


def calls_the_interpreter(test: Any) -> Any:
    """Mark a test that calls `run_interpreted`."""
    return pytest.mark.slow(pytest.mark.skipif(INTERPRETED, reason="would call itself")(test))


def run_interpreted(file: str) -> str:
    """Run a file's tests of kernels in another process, interpreted; returns what it says."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def with_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply bfloat16, as which it has integers: it would multiply these."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def in_float32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def product(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return create_dot(self, in_float32(a), in_float32(b), *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)
