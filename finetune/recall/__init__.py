"""An experiment on memory: what was said beyond the reach of attention is asked for again."""

from typing import Any

from finetune.recall.options import RecallOptions

__all__ = [
    "RecallOptions",
    "run_command",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name == "run_command":
        from finetune.recall.command import run_command

        return run_command
    raise AttributeError(name)
