"""Imports of what takes seconds to import, without what takes them."""

import subprocess
from typing import Any
from unittest.mock import patch

import torch


def import_bitsandbytes() -> None:
    """Import it once for all programs and tests of a process.

    It compiles functions that are not used on a CPU, for which PyTorch imports its compiler, and
    asks pip for the driver of a machine that is not here.
    """

    def as_it_is(function: Any, **_: Any) -> Any:
        return function

    nothing = subprocess.CompletedProcess("pip list", 0, stdout="", stderr="")
    with patch.object(torch, "compile", as_it_is), patch.object(subprocess, "run") as run:
        run.return_value = nothing
        import bitsandbytes  # noqa: F401
