"""Talk to a model: files in and out, and calls."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from finetune.serve.options import ExportOptions, GenerateOptions, ServeOptions

if TYPE_CHECKING:
    from finetune.serve.access import listen
    from finetune.serve.continuation import continue_recording
    from finetune.serve.engine import Engine, Row, Spoken, open_engine
    from finetune.serve.export import export_checkpoint
    from finetune.serve.files import answer_recordings
    from finetune.serve.server import serve
    from finetune.serve.session_file import held_session
    from finetune.serve.targets import list_jobs
    from finetune.serve.words import Words

__all__ = [
    "Engine",
    "ExportOptions",
    "GenerateOptions",
    "Row",
    "ServeOptions",
    "Spoken",
    "Words",
    "answer_recordings",
    "continue_recording",
    "export_checkpoint",
    "held_session",
    "list_jobs",
    "listen",
    "open_engine",
    "serve",
]


_MODULES = {
    "Engine": "engine",
    "Row": "engine",
    "Spoken": "engine",
    "Words": "words",
    "answer_recordings": "files",
    "continue_recording": "continuation",
    "export_checkpoint": "export",
    "held_session": "session_file",
    "list_jobs": "targets",
    "listen": "access",
    "open_engine": "engine",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name not in _MODULES:
        raise AttributeError(name)
    return getattr(import_module(f"finetune.serve.{_MODULES[name]}"), name)
