"""Modules made of `ttt.ops`, and their streaming state."""

from ttt.layers.in_place import InPlaceGating
from ttt.layers.mixer import TTTMixer

__all__ = ["InPlaceGating", "TTTMixer"]
