"""Sweeps: named variations of one configuration, trained one after another and compared."""

from typing import Any

from finetune.sweep.at_once import require_sound_sweep
from finetune.sweep.options import SweepOptions

__all__ = [
    "SweepOptions",
    "require_sound_sweep",
    "run_command",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name == "run_command":
        from finetune.sweep.command import run_command

        return run_command
    raise AttributeError(name)
