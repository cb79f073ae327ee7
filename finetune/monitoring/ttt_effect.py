"""Watches what TTT does to its layers' outputs, and says so early, and when it is out of bounds."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from finetune.config import TrainArgs
from finetune.errors import counted
from ttt.config import MAX_WRITE_STRENGTH
from ttt.layers import layer_class

logger = logging.getLogger(__name__)

INERT_EFFECT = 4e-3
"""Below this share of what it is added to, most of what TTT adds is lost in bfloat16, whose numbers
lie 4e-3 to 8e-3 of their size apart. More is no proof of learning: docs/evidence.md."""
EXPLOSIVE_EFFECT = 100.0
"""Above it, what TTT adds has drowned the layer that it is added to: docs/evidence.md."""
GROWN_INNER_LOSS = 5.0
SMALL_IMPROVEMENT = 0.05
LONG_SHARE = 0.25
"""An inner loss that has grown so many times since the run began, of which an update takes off less
than this share, for a quarter of the run: so it was where the learning rate was too high for the
width. Runs that learned went through it for a sixth at most: docs/evidence.md."""
EARLY_STEP = 5
FIRST_INERT_STEP = 20
"""Untrained, TTT changes nothing: before this step nothing is said about that."""


class EffectWatch:
    """A line on the effect early in a run; a warning, once each, if TTT does nothing in a layer
    after it has had time to, if it drowns one, or if updates no longer lower what they are for."""

    def __init__(self, args: TrainArgs):
        self.args = args
        self.said: list[str] = []
        self.first_inner_losses: dict[str, float] = {}
        self.lost_since: dict[str, int] = {}

    def look(self, step: int, measured: Mapping[str, float]) -> None:
        """
        Args:
            step: that was taken; a logged one.
            measured: by `ttt.measuring`, `layer_05/effect` and so on.
        """
        effects = _by_layer(measured, "effect")
        if not effects:
            return
        if step >= min(EARLY_STEP, self.args.max_steps):
            self._say_once(
                "early",
                logging.INFO,
                f"after {counted(step, 'step')} TTT changes its layers' outputs by {_each(effects)}"
                " of their size; untrained it changes nothing",
            )
        inert = {layer: value for layer, value in effects.items() if value < INERT_EFFECT}
        if inert and step >= self._first_inert_step:
            self._say_once(
                "inert",
                logging.WARNING,
                f"after {counted(step, 'step')} TTT changes the outputs of {_layers(inert)} by "
                f"{_each(inert)} of their size, less than {INERT_EFFECT:g}: there it does nothing. "
                f"{self._advice_if_inert()}, and watch ttt/*/effect.",
            )
        # What is not a number is not below either.
        drowned = {k: v for k, v in effects.items() if not v <= EXPLOSIVE_EFFECT}
        if drowned:
            self._say_once(
                "explosive",
                logging.WARNING,
                f"at step {step} TTT adds {_each(drowned)} times the output of {_layers(drowned)}, "
                f"and drowns it. {self._advice_if_explosive()}, and watch ttt/*/effect.",
            )

        self._look_at_strengths(step, measured)
        self._look_at_inner_losses(step, measured)

    def _look_at_inner_losses(self, step: int, measured: Mapping[str, float]) -> None:
        after = _by_layer(measured, "inner_loss_after")
        lost = {}
        for layer, before in _by_layer(measured, "inner_loss_before").items():
            first = self.first_inner_losses.setdefault(layer, before)
            is_small = before - after[layer] < SMALL_IMPROVEMENT * before
            if not (is_small and before > GROWN_INNER_LOSS * first):
                self.lost_since.pop(layer, None)
            elif step - self.lost_since.setdefault(layer, step) >= LONG_SHARE * self.args.max_steps:
                lost[layer] = f"from {first:.3g} to {before:.3g} ({layer})"
        if lost:
            self._say_once(
                "inner_loss",
                logging.WARNING,
                f"at step {step} the inner loss of {_layers(lost)} has grown "
                f"{', '.join(lost.values())}, and for a quarter of the run an update has taken off "
                f"less than {SMALL_IMPROVEMENT:.0%}: TTT learns next to nothing there. Most likely "
                "the learning rate is too high for this width: begin anew with a lower "
                f"optim.ttt_lr (now {self.args.optim.ttt_lr:g}), and watch ttt/*/inner_loss_*.",
            )

    def _look_at_strengths(self, step: int, measured: Mapping[str, float]) -> None:
        strengths = _by_layer(measured, "write_strength")
        bound = {k: v for k, v in strengths.items() if v >= 0.999 * MAX_WRITE_STRENGTH}
        if bound:
            self._say_once(
                "write_strength",
                logging.WARNING,
                f"at step {step} β of {_layers(bound)} has met its bound, {MAX_WRITE_STRENGTH:g}: "
                "above it, float32 could not solve for chunks of frames that are much alike. "
                "Lower optim.ttt_lr or ttt.write_strength, and watch ttt/*/write_strength.",
            )

    @property
    def _first_inert_step(self) -> int:
        """A tenth of the run, and all of the learning rates' rise, are time enough to begin."""
        share = max(0.1, self.args.optim.pct_start)
        return max(FIRST_INERT_STEP, round(share * self.args.max_steps))

    def state_dict(self) -> dict[str, Any]:
        return {
            "said": self.said,
            "first_inner_losses": self.first_inner_losses,
            "lost_since": self.lost_since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.said = list(state["said"])
        # Checkpoints of earlier versions have none: what comes next is the first.
        self.first_inner_losses = dict(state.get("first_inner_losses", {}))
        self.lost_since = dict(state.get("lost_since", {}))

    def _say_once(self, what: str, level: int, text: str) -> None:
        if what not in self.said:
            self.said.append(what)
            logger.log(level, "%s", text)

    def _advice_if_inert(self) -> str:
        way = layer_class(self.args.ttt.method).how_to_strengthen(self.args.ttt)
        return _either(way, f"raise optim.ttt_lr (now {self.args.optim.ttt_lr:g})")

    def _advice_if_explosive(self) -> str:
        way = layer_class(self.args.ttt.method).how_to_weaken(self.args.ttt)
        return _either(way, f"lower optim.ttt_lr (now {self.args.optim.ttt_lr:g})")


def _by_layer(measured: Mapping[str, float], name: str) -> dict[str, float]:
    """Return a metric of all layers that have it, by their two digits."""
    return {
        key.split("/")[0].removeprefix("layer_"): value
        for key, value in measured.items()
        if key.endswith(f"/{name}")
    }


def _either(way: str, other: str) -> str:
    """Return the beginning of a sentence."""
    text = f"{way}, or {other}" if way else other
    return text[0].upper() + text[1:]


def _each(effects: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2g} ({layer})" for layer, value in effects.items())


def _layers(layers: Collection[str]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
