"""An experiment on memory: what was said beyond the reach of attention is asked for again."""

from finetune.recall.command import run_command

__all__ = [
    "run_command",
]
