"""Test-time training for Moshi: layers whose weights keep learning while the model listens."""

import importlib
from typing import TYPE_CHECKING, Any

from ttt.config import TTTArgs

if TYPE_CHECKING:
    from ttt.build import build_model
    from ttt.model import (
        HiddenStates,
        TTTLMModel,
        measuring,
        state_bytes,
        ttt_parameters,
        without_ttt,
    )
    from ttt.state import (
        clear_rows,
        get_row,
        get_state,
        reset,
        row_bytes,
        row_problem,
        set_row,
        set_state,
        use_in_rows,
    )
    from ttt.streaming import block_streaming, eager_streaming, lengthen_caches

__all__ = [
    "HiddenStates",
    "TTTArgs",
    "TTTLMModel",
    "block_streaming",
    "build_model",
    "clear_rows",
    "eager_streaming",
    "get_row",
    "get_state",
    "lengthen_caches",
    "measuring",
    "reset",
    "row_bytes",
    "row_problem",
    "set_row",
    "set_state",
    "state_bytes",
    "ttt_parameters",
    "use_in_rows",
    "without_ttt",
]


def __getattr__(name: str) -> Any:
    """Everything but `TTTArgs` needs torch and moshi, which take seconds to import: a program that
    only reads a configuration does without them."""
    if name in __all__:
        for module in ("ttt.model", "ttt.build", "ttt.state", "ttt.streaming"):
            found = importlib.import_module(module)
            if hasattr(found, name):
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
