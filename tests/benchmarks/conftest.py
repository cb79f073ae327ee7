"""Fixtures for the benchmarks' tests."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Imports one of the benchmarks, for the length of a test."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    imported: list[Any] = []

    def load(name: str) -> ModuleType:
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in {
        *imported,
        "training_arms",
        "train_step",
        "streaming",
        "small_gpu",
    } & sys.modules.keys():
        del sys.modules[name]
