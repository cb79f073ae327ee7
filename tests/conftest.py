"""Before `moshi` is imported: it compiles small functions, which costs more than the tests do."""

import gc
import importlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ["NO_TORCH_COMPILE"] = "1"
# Two threads that wait for each other are many times slower than one where others work as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Leave out of every later garbage collection what is there for good: torch, and all tests."""
    if "torch" in sys.modules:
        from light_imports import import_bitsandbytes

        import_bitsandbytes()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a small run: see `training_tools.write_config`."""
    from training_tools import write_config

    return write_config(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The runs that tests share, by their overrides."""
    return tmp_path_factory.mktemp("finished"), {}


@pytest.fixture
def finished_run(config: Path, finished_runs: tuple[Path, dict[str, Path]]) -> Callable[..., Any]:
    """Puts a run to its last step, with the given overrides, into a folder that does not exist yet
    or is empty: a copy, for the same run was made before."""
    from training_tools import train

    parent, known = finished_runs

    def copy(run_dir: Path, overrides: dict[str, Any] | None = None) -> Path:
        key = json.dumps(overrides or {}, sort_keys=True)
        if key not in known:
            train(config, parent / str(len(known)), overrides)
            known[key] = parent / str(len(known))
        return shutil.copytree(known[key], run_dir, symlinks=True, dirs_exist_ok=True)

    return copy


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """A program under test writes its log to what is standard output then."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    yield
    if "training_tools" in sys.modules:
        sys.modules["training_tools"].leave_folders()


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that imports one of the benchmarks, for the length of a test."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    # They collect garbage before each of their lines, for the peak of a GPU's memory: here it takes
    # longer than the lines, as all objects of all tests before are looked at.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    imported: list[Any] = []

    def load(name: str) -> ModuleType:
        imported.append(name)
        return importlib.import_module(name)

    yield load
    shared = {
        "training_arms",
        "train_step",
        "streaming",
        "small_gpu",
        "callers",
        "same_window",
        "precision_models",
    }
    for name in {*imported, *shared} & sys.modules.keys():
        del sys.modules[name]
