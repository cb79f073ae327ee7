"""Losses, gradients and weights that are not finite: what a run tolerates of them, and what ends
it."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from finetune.config import TrainArgs
from finetune.distributed import World, local
from finetune.errors import UserError
from finetune.safety import all_finite
from finetune.step.optim import Optimizer, StepResult

logger = logging.getLogger(__name__)

HAS_DIVERGED = "the run has diverged."
"""What a message ends with before its remedy, where a run has diverged for sure."""
LOST_AT_THE_END = 2
"""So many lost steps in a row are no accident where nothing follows them."""


def lower_rates(args: TrainArgs) -> str:
    """Return what to do, of a run that diverged, before it is run again."""
    if not args.ttt.enabled:
        return "Lower optim.lr"
    inner = ", or ttt.learning_rate, or set ttt.max_delta_norm" if args.ttt.has_fixed_step else ""
    return f"Lower optim.lr or optim.ttt_lr{inner}"


class LostSteps:
    """Counts steps that changed nothing, because a loss or gradient was not finite, and ends a run
    that does not recover."""

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
            raise UserError(
                f"the {self._last_steps()} had a loss or gradient that is not finite "
                f"(max_nonfinite_steps), and the model did not recover: {HAS_DIVERGED} "
                f"{self._remedy()}"
            )

    def require_finite_weights(self, step: int, optimizer: Optimizer, world: World) -> None:
        """Check the weights that train; every process calls this.

        Raises:
            UserError: some are NaN or infinite, in any process: no later step mends them.
        """
        named = [
            (name, local(parameter))
            for role, names in optimizer.names.items()
            for name, parameter in zip(names, optimizer.parameters[role], strict=True)
        ]
        # One look at the device for all of them; a part of a sharded one may be empty.
        are_bad = torch.stack([~all_finite(weight) for _, weight in named]).float()
        bad = [
            name
            for (name, _), count in zip(named, world.sum(are_bad).tolist(), strict=True)
            if count
        ]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(
                f"after step {step} weights that train are NaN or infinite "
                f"({', '.join(bad[:3])}{more}), and nothing of this step is saved: {HAS_DIVERGED} "
                f"{self._remedy()}"
            )

    def require_finite_end(self, step: int, eval_loss: float | None) -> None:
        """Check what is known of the last step.

        Args:
            eval_loss: of the evaluation after it; None: there is none.

        Raises:
            UserError: the run has diverged.
        """
        if eval_loss is not None and not math.isfinite(eval_loss):
            raise UserError(
                f"the loss of the evaluation after step {step}, the last, is {eval_loss}: "
                f"{HAS_DIVERGED} {self._remedy()}"
            )
        if eval_loss is None and self.nonfinite_in_a_row >= LOST_AT_THE_END:
            raise UserError(
                f"the {self._last_steps()} before the run's end, step {step}, had a loss or "
                f"gradient that is not finite, and no evaluation shows that the model is well. "
                f"They changed no weights. Look at their data, or evaluate the checkpoint. If the "
                f"run has diverged: {self._remedy()}"
            )

    def _last_steps(self) -> str:
        count = self.nonfinite_in_a_row
        return "last step" if count == 1 else f"last {count} steps"

    def _remedy(self) -> str:
        return (
            f"{lower_rates(self.args)}, and continue from an earlier checkpoint, if there is one "
            f"in {Path(self.args.run_dir) / 'checkpoints'}, or begin anew."
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.nonfinite_steps = state["nonfinite_steps"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
