"""Sweeps: named variations of one configuration, trained one after another and compared."""

from finetune.sweep.command import run_command

__all__ = [
    "run_command",
]
