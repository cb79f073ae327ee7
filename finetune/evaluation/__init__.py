"""Does test-time training help? Loss by position, paired likelihood, and health of speech.

`periodic.py` is the loss that a training run computes now and then; everything else belongs to
`moshi-ttt evaluate`, which begins in `run.py` and consists of what is in `tasks/`.
"""

from typing import TYPE_CHECKING, Any

from finetune.evaluation.options import Options

if TYPE_CHECKING:
    from finetune.evaluation.periodic import build_speech_check, evaluate
    from finetune.evaluation.run import evaluate_checkpoint

__all__ = [
    "Options",
    "build_speech_check",
    "evaluate",
    "evaluate_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import what is slow to import only when it is asked for."""
    if name == "evaluate_checkpoint":
        from finetune.evaluation.run import evaluate_checkpoint

        return evaluate_checkpoint
    if name in ("build_speech_check", "evaluate"):
        from finetune.evaluation import periodic

        return getattr(periodic, name)
    raise AttributeError(name)
