"""Losses of single targets before any step say more of a float8 base than their mean does.

A number that falls into another step of e4m3 is off by 6 %, and everything behind it is rounded
otherwise. So any two right forms of a model are about as far from each other as any two others are,
wherever they begin to differ, and their mean loss moves as much as some errors move it. The
distance over thousands of targets hardly varies: a form that is half as far again as the stock
model's own forms are computes something else.
"""

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor

FACTOR = 1.5
"""Of the largest distance between two forms of the stock model."""


@torch.no_grad()
def target_losses(model: LMModel, codes: Tensor) -> Tensor:
    """Cross-entropy of every target of codes [B, 17, T] in nats, [B, 1 + 8, T]; 0 at those that the
    model masks."""
    output, offset = model(codes), model.audio_offset
    audio = codes[:, offset : offset + model.dep_q]
    pairs = (
        (output.text_logits, codes[:, :offset], output.text_mask),
        (output.logits, audio, output.mask),
    )
    found = []
    for logits, targets, mask in pairs:
        known = torch.where(mask, targets, 0)
        nll = F.cross_entropy(logits.flatten(0, 2).float(), known.flatten(), reduction="none")
        found.append(torch.where(mask, nll.view_as(known), 0.0))
    return torch.cat(found, 1)


class Distances:
    """How far the losses of targets are from the stock model's: the root of the mean square."""

    def __init__(self) -> None:
        self.stock: Tensor | None = None
        self.largest = 0.0

    def of(self, losses: Tensor) -> float:
        """Return the distance of another form's losses; the first ones are the stock model's."""
        if self.stock is None:
            self.stock = losses
        return (losses - self.stock).square().mean().sqrt().item()

    def add_stock(self, losses: Tensor) -> float:
        """Return the distance of another form of the stock model; the bound is made of these."""
        distance = self.of(losses)
        self.largest = max(self.largest, distance)
        return distance

    def share_of_bound(self, distance: float) -> float:
        """Return a distance relative to what is allowed."""
        return distance / max(FACTOR * self.largest, 1e-12)
