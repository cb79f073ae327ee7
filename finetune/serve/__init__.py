"""Talk to a model: files in and out, and calls."""

from finetune.serve.engine import Engine, Row, Spoken, open_engine

__all__ = ["Engine", "Row", "Spoken", "open_engine"]
