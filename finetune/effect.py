"""Watches what TTT does to its layers' outputs, and says so early, and when it is out of bounds."""

import logging
from collections.abc import Mapping
from typing import Any

from finetune.args import TrainArgs

logger = logging.getLogger(__name__)

INERT_EFFECT = 1e-6
"""Below this share of what it is added to, TTT as good as does not happen."""
EXPLOSIVE_EFFECT = 100.0
"""Above it, what TTT adds has drowned the layer that it is added to: docs/evidence.md."""
EARLY_STEP = 5


class EffectWatch:
    """A line on the effect early in a run; a warning, once each, if TTT does nothing after it has
    had time to, or if it drowns its layers."""

    def __init__(self, args: TrainArgs):
        self.args = args
        self.largest = 0.0
        self.said: list[str] = []

    def look(self, step: int, measured: Mapping[str, float]) -> None:
        """
        Args:
            step: that was taken; a logged one.
            measured: by `ttt.measuring`, `layer_05/effect` and so on.
        """
        effects = {k.split("/")[0]: v for k, v in measured.items() if k.endswith("/effect")}
        if not effects:
            return
        self.largest = max(self.largest, *effects.values())
        if step >= min(EARLY_STEP, self.args.max_steps):
            each = ", ".join(f"{v:.2g} ({k.removeprefix('layer_')})" for k, v in effects.items())
            self._say_once(
                "early",
                logging.INFO,
                f"after {step} steps TTT changes its layers' outputs by {each} of their size; "
                "untrained it changes nothing",
            )
        if step >= max(20, self.args.max_steps // 10) and self.largest < INERT_EFFECT:
            self._say_once(
                "inert",
                logging.WARNING,
                f"after {step} steps TTT changes its layers' outputs by {self.largest:.1e} of "
                f"their size at most: it does nothing. {self._advice_if_inert()}, and watch "
                "ttt/*/effect.",
            )
        if self.largest > EXPLOSIVE_EFFECT:
            self._say_once(
                "explosive",
                logging.WARNING,
                f"at step {step} TTT adds {self.largest:.3g} times what its layer gives: it drowns "
                f"it. {self._advice_if_explosive()}, and watch ttt/*/effect.",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self.largest, "said": self.said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.largest, self.said = state["largest"], list(state["said"])

    def _say_once(self, what: str, level: int, text: str) -> None:
        if what not in self.said:
            self.said.append(what)
            logger.log(level, "%s", text)

    def _advice_if_inert(self) -> str:
        ttt, outer = self.args.ttt, f"raise optim.ttt_lr (now {self.args.optim.ttt_lr:g})"
        if not ttt.has_fixed_step:
            return outer.capitalize()
        inner = f"aise ttt.learning_rate (now {ttt.inner_learning_rate:g}), or {outer}"
        return f"Set ttt.lr_scale: relative, or r{inner}" if ttt.lr_scale == "none" else f"R{inner}"

    def _advice_if_explosive(self) -> str:
        ttt, outer = self.args.ttt, f"lower optim.ttt_lr (now {self.args.optim.ttt_lr:g})"
        if not ttt.has_fixed_step:
            return outer.capitalize()
        return (
            "With write: sum, what all chunks have in common, such as padding and silence, adds "
            "up: set ttt.write: delta or ttt.state_decay, lower ttt.learning_rate (now "
            f"{ttt.inner_learning_rate:g}), or {outer}"
        )
