"""Does test-time training help? Loss by position, paired likelihood, and health of speech.

`periodic.py` is the loss that a training run computes now and then; everything else belongs to
`moshi-ttt evaluate`, which begins in `run.py`.
"""

from finetune.evaluation.options import Options, read_options
from finetune.evaluation.periodic import build_speech_check, evaluate
from finetune.evaluation.run import evaluate_checkpoint

__all__ = [
    "Options",
    "build_speech_check",
    "evaluate",
    "evaluate_checkpoint",
    "read_options",
]
