"""What is missing on a machine is said before the first step."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.errors import UserError
from finetune.model.compilers import require_compiler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    cpp_builder.cpp_compiler_search.cache_clear()
    with config.patch({"cpp.cxx": (None, "g++")}):
        yield tmp_path
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_a_cpu_without_compilation_needs_nothing(no_programs: Path) -> None:
    require_compiler(CPU, compile=False, dtype=torch.bfloat16)


def test_a_cpu_needs_a_cpp_compiler_to_compile(no_programs: Path) -> None:
    with pytest.raises(UserError, match="compile: on a CPU this needs a C\\+\\+ compiler"):
        require_compiler(CPU, compile=True, dtype=torch.float32)


def test_a_cpu_compiles_float32_alone() -> None:
    with pytest.raises(UserError, match="compile: true on a CPU needs param_dtype: float32"):
        require_compiler(CPU, compile=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_needs_a_compiler_of_the_host_in_any_case(
    no_programs: Path, triton: None, compile: bool
) -> None:
    with pytest.raises(UserError, match="need a C compiler on this machine"):
        require_compiler(CUDA, compile=compile, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_gpu_takes_gcc_or_clang(no_programs: Path, triton: None, name: str) -> None:
    path = no_programs / name
    path.touch()
    os.chmod(path, 0o755)
    require_compiler(CUDA, compile=True, dtype=torch.bfloat16)


def test_a_gpu_takes_the_compiler_that_cc_names(
    no_programs: Path, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "icx")
    require_compiler(CUDA, compile=True, dtype=torch.bfloat16)


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="need Triton"):
        require_compiler(CUDA, compile=False, dtype=torch.bfloat16)
