"""Test-time training for Moshi: layers whose weights keep learning while the model listens."""

from ttt.config import TTTArgs
from ttt.model import (
    HiddenStates,
    TTTLMModel,
    build_model,
    measuring,
    state_bytes,
    ttt_parameters,
    without_ttt,
)
from ttt.state import get_state, reset, set_state
from ttt.streaming import block_streaming

__all__ = [
    "HiddenStates",
    "TTTArgs",
    "TTTLMModel",
    "block_streaming",
    "build_model",
    "get_state",
    "measuring",
    "reset",
    "set_state",
    "state_bytes",
    "ttt_parameters",
    "without_ttt",
]
