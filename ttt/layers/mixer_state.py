"""A stream keeps a state of each layer of `ttt.layers.mixer`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt.layers.base import TTTState
from ttt.layers.conv_tail import ConvTail
from ttt.ops.inner_loop.pieces import InnerLayers, Written, flatten


@dataclass
class TTTMixerState(TTTState):
    """The fast weights of each row's stream, and what the open mini-batch will write; in float32
    (float64 in a float64 model)."""

    layers: InnerLayers
    """Per inner layer W [B, H, in, out] and b [B, H, out], at the open mini-batch's start."""
    written: Written
    """Per inner layer its inputs [B, H, K, in] and errors [B, H, K, out]; places from
    `num_pending` on hold nothing of meaning."""
    num_pending: Tensor
    """[B], frames in the open mini-batch, 0 to K - 1."""
    initial: InnerLayers
    """The learned weights that a stream starts from: the module's parameters, without B."""
    tail: ConvTail | None
    """What the convolutions look back to; None: there are none."""

    def fast_weights(self) -> tuple[Tensor, ...]:
        return flatten(self.layers)

    def tensors(self) -> dict[str, Tensor]:
        named = {"num_pending": self.num_pending}
        for index, (layer, written) in enumerate(zip(self.layers, self.written, strict=True), 1):
            names = (f"w{index}", f"b{index}", f"pending_x{index}", f"pending_e{index}")
            named.update(zip(names, (*layer, *written), strict=True))
        if self.tail is not None:
            named |= {"tail": self.tail.frames, "has_begun": self.tail.has_begun}
        return named

    @torch.no_grad()
    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        for fast, start in zip(self.fast_weights(), flatten(self.initial), strict=True):
            rows = reset_mask.view(-1, *(1 for _ in start.shape))
            fast.copy_(torch.where(rows, start.to(fast.dtype), fast))
