"""Demonstration assets: synthetic dialogues, a small tokenizer and a small Mimi."""

from typing import Any

from finetune.demo.options import DemoDataOptions, DemoOptions

__all__ = [
    "DemoDataOptions",
    "DemoOptions",
    "make_dialogues",
    "run_demo",
    "training_command",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name == "make_dialogues":
        from finetune.demo.dialogues import make_dialogues

        return make_dialogues
    if name == "training_command":
        from finetune.demo.next_step import training_command

        return training_command
    if name == "run_demo":
        from finetune.demo.run import run_demo

        return run_demo
    raise AttributeError(name)
