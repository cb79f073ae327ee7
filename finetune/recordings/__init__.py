"""Folders of recordings: listed, annotated, checked, drawn and counted."""

from importlib import import_module
from typing import Any

from finetune.recordings.options import (
    AnnotateOptions,
    CheckOptions,
    IndexOptions,
    ShowOptions,
    StatsOptions,
)

__all__ = [
    "AnnotateOptions",
    "CheckOptions",
    "IndexOptions",
    "ShowOptions",
    "StatsOptions",
    "annotate_data",
    "check_data",
    "describe_data",
    "index_folder",
    "show_segment",
]

_MODULES = {
    "annotate_data": "annotate",
    "check_data": "check",
    "describe_data": "stats",
    "index_folder": "index",
    "show_segment": "show",
}


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"finetune.recordings.{_MODULES[name]}"), name)
