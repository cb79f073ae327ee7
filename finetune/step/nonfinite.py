"""Steps that changed nothing, because a loss or gradient was not finite."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from finetune.config import TrainArgs
from finetune.errors import UserError
from finetune.step.optim import StepResult

logger = logging.getLogger(__name__)


class LostSteps:
    """Counts them, and ends a run that does not recover."""

    def __init__(self, args: TrainArgs) -> None:
        self.args = args
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0

    def count(self, step: int, losses: tuple[float, float], result: StepResult) -> None:
        """
        Args:
            losses: of text and audio.
        """
        if math.isfinite(sum(losses)) and result.is_finite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        logger.warning(
            "step %d skipped: text loss %s, audio loss %s, gradient norm %s",
            step,
            *losses,
            result.grad_norm,
        )

    def stop_if_too_many(self) -> None:
        """
        Raises:
            UserError: too many steps in a row were not finite.
        """
        if self.nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            count = self.nonfinite_in_a_row
            last = "last step" if count == 1 else f"last {count} steps"
            inner = ", or ttt.learning_rate, or set ttt.max_delta_norm"
            raise UserError(
                f"the {last} had a loss or gradient that is not "
                f"finite (max_nonfinite_steps); the model does not recover from that. Lower "
                f"optim.lr or optim.ttt_lr{inner if self.args.ttt.has_fixed_step else ''}, and "
                f"continue from an earlier checkpoint, if there is one in "
                f"{Path(self.args.run_dir) / 'checkpoints'}, or begin anew."
            )

    def state_dict(self) -> dict[str, int]:
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.nonfinite_steps = state["nonfinite_steps"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
