"""Pure functions: tensors in, tensors out. A folder is an operator; `reference` in it defines what
the fast forms beside it compute."""

from ttt.ops.in_place import (
    causal_conv,
    chunk_conv,
    chunk_delta,
    chunk_errors,
    in_place_delta,
    in_place_ttt,
    reference,
)
from ttt.ops.inner_loop import inner_losses, short_conv, ttt_linear, ttt_mlp
from ttt.ops.rope import rope

__all__ = [
    "causal_conv",
    "chunk_conv",
    "chunk_delta",
    "chunk_errors",
    "in_place_delta",
    "in_place_ttt",
    "inner_losses",
    "reference",
    "rope",
    "short_conv",
    "ttt_linear",
    "ttt_mlp",
]
