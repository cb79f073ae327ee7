"""The arithmetic of one optimizer step: loss, gradients, update."""

from finetune.step.captured import CapturedGradients
from finetune.step.compact_adamw import moment_bytes
from finetune.step.gradients import accumulate_gradients
from finetune.step.loss import LossWeights, stream_sums, target_weights, total_weight
from finetune.step.nonfinite import HAS_DIVERGED, LostSteps, lower_rates
from finetune.step.optim import Optimizer, StepResult

__all__ = [
    "HAS_DIVERGED",
    "CapturedGradients",
    "LossWeights",
    "LostSteps",
    "Optimizer",
    "StepResult",
    "accumulate_gradients",
    "lower_rates",
    "moment_bytes",
    "stream_sums",
    "target_weights",
    "total_weight",
]
