"""Pure functions: tensors in, tensors out. `reference` and `reference_linear` define, the
rest is fast."""

from ttt.ops import reference, reference_linear
from ttt.ops.delta import chunk_errors, in_place_delta
from ttt.ops.in_place import chunk_conv, chunk_delta, in_place_ttt
from ttt.ops.linear import inner_losses, rope, ttt_linear, ttt_mlp
from ttt.ops.short_conv import short_conv

__all__ = [
    "chunk_conv",
    "chunk_delta",
    "chunk_errors",
    "in_place_delta",
    "in_place_ttt",
    "inner_losses",
    "reference",
    "reference_linear",
    "rope",
    "short_conv",
    "ttt_linear",
    "ttt_mlp",
]
