"""This package holds In-Place TTT: its definition, and its fast forms for sequences and for
streams."""

from ttt.ops.in_place import reference
from ttt.ops.in_place.delta import chunk_errors, in_place_delta
from ttt.ops.in_place.sum import causal_conv, chunk_conv, chunk_delta, in_place_ttt

__all__ = [
    "causal_conv",
    "chunk_conv",
    "chunk_delta",
    "chunk_errors",
    "in_place_delta",
    "in_place_ttt",
    "reference",
]
