"""Compilers that a model needs beside Python are looked for once, not missed in the middle of the
first step."""

import importlib.util
import os
import shutil

import torch

from finetune.errors import UserError


def require_compiler(device: torch.device, *, compile: bool, dtype: torch.dtype) -> None:
    """Check that what runs on `device` can be built there.

    Args:
        compile: whether the layers are compiled in training.
        dtype: of the parameters.

    Raises:
        UserError: no compiler, no Triton, or a type that cannot be compiled for a CPU.
    """
    if device.type == "cuda":
        _require_triton()
    elif compile:
        _require_cpp(dtype)


def _require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "device: the GPU kernels need Triton, which is not installed. It comes with PyTorch "
            "for Linux: install that, or `pip install triton`."
        )
    # Triton builds the launchers of its kernels, our own among them, with a compiler of the host.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "device: the GPU kernels need a C compiler on this machine, and there is neither gcc "
            "nor clang on PATH, nor one that the environment variable CC names. Install one "
            "(`apt-get install gcc`); compile: false needs it as well."
        )


def _require_cpp(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        # inductor rounds between operators as eager code does on CUDA alone.
        raise UserError(
            "compile, param_dtype: compile: true on a CPU needs param_dtype: float32. In bfloat16 "
            "compiled code rounds less often there than evaluation and streaming do, and another "
            "model would be trained than the one that is used; set compile to false or "
            "param_dtype to float32."
        )
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "compile: on a CPU this needs a C++ compiler, and none was found. Install one "
            "(`apt-get install g++`), name one in the environment variable CXX, or set compile "
            "to false."
        ) from error
