"""Modules made of `ttt.ops`, and their streaming state."""

from ttt.layers.in_place import InPlaceGating

__all__ = ["InPlaceGating"]
