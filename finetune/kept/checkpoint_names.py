"""Checkpoints are known by their names, which hold their steps."""

import re
from pathlib import Path

CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{6,})")
DIVERGED = ".diverged"
"""What ends the name of a checkpoint from which nothing goes on: its model has diverged."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Return all in a folder that is called like a checkpoint, the earliest step first."""
    found = [path for path in folder.glob("checkpoint_*") if CHECKPOINT_NAME.fullmatch(path.name)]
    # Not by name: from step 1,000,000 on they have another length.
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was made, by its name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])
