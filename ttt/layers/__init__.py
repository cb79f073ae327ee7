"""Modules made of `ttt.ops`, and their streaming state."""

from ttt.layers.base import Cost, Place, TTTLayer, TTTState, layer_class

__all__ = ["Cost", "Place", "TTTLayer", "TTTState", "layer_class"]
