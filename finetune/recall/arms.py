"""The arms of the experiment: ways to remember, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from finetune.errors import UserError
from ttt import TTTArgs
from ttt.options import abbreviated
from ttt.registry import METHODS


class Rates(Protocol):
    """A preset's learning rates of TTT parameters.

    A mixer's are matrices that start from random numbers: in a wide model steps must be smaller, or
    its inner loss grows until an update no longer lowers it.
    """

    @property
    def ttt_lr(self) -> float:
        """Return that of TTT in place."""

    @property
    def mixer_lr(self) -> float:
        """Return that of mixers."""


@dataclass(frozen=True)
class Arm:
    """An arm is one way to remember; all else is the same in all arms."""

    ttt: dict[str, Any] | None = None
    """Options of `TTTArgs`; None: no TTT."""
    is_full_attention: bool = False
    """Attention sees the whole training sequence instead of a window."""
    is_finetuned: bool = False
    """A model without TTT is trained on the streams' text first; then TTT is added (or, without
    `ttt`, is not: the control), and it is trained on, with learning rates a tenth of the
    others' for all but the TTT parameters."""

    @property
    def is_mixer(self) -> bool:
        """Return whether its TTT is a layer of its own, between attention and MLP."""
        return self.ttt is not None and not METHODS[TTTArgs(**self.ttt).method].replaces_mlp

    def ttt_lr(self, rates: "Rates") -> float:
        """Return the learning rate of its TTT parameters."""
        return rates.mixer_lr if self.is_mixer else rates.ttt_lr

    def ttt_args(self, shared: Mapping[str, Any], **sizes: Any) -> TTTArgs:
        """Return the arm's TTT.

        Args:
            shared: options of `TTTArgs` that all arms with TTT have.
            sizes: options that those have whose method reads them.
        """
        if self.ttt is None:
            return TTTArgs()
        args = TTTArgs(**{"enabled": True, **shared, **self.ttt})
        return replace(args, **{key: value for key, value in sizes.items() if args.reads(key)})


ARMS: dict[str, Arm] = {
    "off": Arm(),
    "sum": Arm({"write": "sum", "target": "text"}),
    "sum_input": Arm({"write": "sum", "target": "input"}),
    "sum_hidden": Arm({"write": "sum", "target": "hidden"}),
    "delta": Arm({"write": "delta", "target": "text"}),
    "delta_input": Arm({"write": "delta", "target": "input"}),
    "delta_hidden": Arm({"write": "delta", "target": "hidden"}),
    "linear": Arm({"method": "linear"}),
    "mlp": Arm({"method": "mlp"}),
    "full": Arm(is_full_attention=True),
    "finetuned": Arm({"write": "delta", "target": "text"}, is_finetuned=True),
    "finetuned_hidden": Arm({"write": "delta", "target": "hidden"}, is_finetuned=True),
    "retrained": Arm(is_finetuned=True),
}
"""By name. `sum` and `delta` are evaluated a second time with nothing written."""


def check_arms(arms: Sequence[str]) -> None:
    """
    Raises:
        UserError: one of them is unknown.
    """
    unknown = [name for name in arms if name not in ARMS]
    if unknown:
        names = abbreviated(", ".join(unknown))
        raise UserError(f"--arms: there is no {names}. Choose from {', '.join(ARMS)}.")
