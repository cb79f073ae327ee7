"""TTT-Linear and TTT-MLP: their definition, and their fast forms."""

from ttt.ops.inner_loop.short_conv import short_conv
from ttt.ops.inner_loop.ttt_linear_mlp import inner_losses, ttt_linear, ttt_mlp

__all__ = ["inner_losses", "short_conv", "ttt_linear", "ttt_mlp"]
