"""Demonstration assets: synthetic dialogues, a small tokenizer and a small Mimi."""

from finetune.demo.dialogues import make_dialogues
from finetune.demo.run import run_demo

__all__ = [
    "make_dialogues",
    "run_demo",
]
