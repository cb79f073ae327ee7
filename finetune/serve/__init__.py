"""Talk to a model: files in and out, and calls."""

from typing import TYPE_CHECKING, Any

from finetune.serve.options import ExportOptions, GenerateOptions, ServeOptions

if TYPE_CHECKING:
    from finetune.serve.engine import open_engine
    from finetune.serve.export import export_checkpoint
    from finetune.serve.files import answer_recordings
    from finetune.serve.server import serve

__all__ = [
    "ExportOptions",
    "GenerateOptions",
    "ServeOptions",
    "answer_recordings",
    "export_checkpoint",
    "open_engine",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name == "open_engine":
        from finetune.serve.engine import open_engine

        return open_engine
    if name == "answer_recordings":
        from finetune.serve.files import answer_recordings

        return answer_recordings
    if name == "export_checkpoint":
        from finetune.serve.export import export_checkpoint

        return export_checkpoint
    if name == "serve":
        from finetune.serve.server import serve

        return serve
    raise AttributeError(name)
