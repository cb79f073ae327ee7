"""A finished run for tests that replace it, and what lies in a folder before and after."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_tools import train

from finetune.checkpoint.run_record import NAME

OVERWRITE: dict[str, Any] = {"overwrite_run_dir": True, "max_steps": 1}
OWN = (NAME, ".lock")


def tree(folder: Path, *, without: Any = OWN) -> dict[str, Any]:
    """All that lies in a folder: contents of files, targets of links, None for folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name not in without:
            what = os.readlink(path) if path.is_symlink() else None
            found[name] = path.read_bytes() if path.is_file() and what is None else what
    return found


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(config, run_dir, {"max_steps": 2, "ckpt_freq": 1})
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)
