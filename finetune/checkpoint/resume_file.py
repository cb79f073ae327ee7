"""A checkpoint's `resume.pt`: what a run continues from, apart from the optimizer's tensors."""

import pickle
from pathlib import Path
from typing import Any

import torch

from finetune.errors import UserError


def read_resume_file(checkpoint: Path) -> Any:
    """Return what it holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return torch.load(checkpoint / "resume.pt", map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read {checkpoint / 'resume.pt'}: {error}") from error


def frozen_fingerprint_of(checkpoint: Path) -> str | None:
    """Return what tells the frozen weights that a checkpoint was trained on from others; None where
    all its weights train, and where nothing says it: resume.pt is of an earlier version, lost or
    damaged."""
    try:
        found = read_resume_file(checkpoint)["base"]["fingerprint"]
    except (UserError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None
