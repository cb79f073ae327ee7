"""Pure functions: tensors in, tensors out. `reference` and `reference_linear` define, the
rest is fast."""

from ttt.ops.in_place import reference
from ttt.ops.in_place.delta import chunk_errors, in_place_delta
from ttt.ops.in_place.sum import chunk_conv, chunk_delta, in_place_ttt
from ttt.ops.inner_loop import reference as reference_linear
from ttt.ops.inner_loop.ttt_linear_mlp import inner_losses, rope, ttt_linear, ttt_mlp

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
    "ttt_linear",
    "ttt_mlp",
]
