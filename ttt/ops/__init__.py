"""Pure functions: tensors in, tensors out. `reference` defines, the rest is fast."""

from ttt.ops import reference
from ttt.ops.delta import chunk_errors, in_place_delta
from ttt.ops.in_place import chunk_conv, chunk_delta, in_place_ttt

__all__ = [
    "chunk_conv",
    "chunk_delta",
    "chunk_errors",
    "in_place_delta",
    "in_place_ttt",
    "reference",
]
