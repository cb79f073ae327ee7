"""The arms of the experiment: ways to remember, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.errors import UserError
from ttt import TTTArgs
from ttt.options import abbreviated


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
    ttt_lr_factor: float = 1.0
    """Of the preset's learning rate of TTT parameters."""

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
    "linear": Arm({"method": "linear"}, ttt_lr_factor=3.0),
    "mlp": Arm({"method": "mlp"}, ttt_lr_factor=3.0),
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
