"""The gradients of a step: over micro-batches and processes, the loss of one global batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.distributed import World, sum_gradients_when_needed
from finetune.step.loss import LossWeights, stream_sums, total_weight
from ttt import TTTLMModel


def accumulate_gradients(
    model: TTTLMModel, batches: Sequence[Tensor], weights: LossWeights, world: World
) -> tuple[float, float]:
    """Gradients of the loss over all batches of all data ranks; its text and audio parts.

    Of a model that is not sharded each process has its own share of them, for the optimizer to sum.

    Args:
        batches: codes [B, 17, T], of one forward and backward pass each.
    """
    weight = world.sum_over_data(total_weight(model, batches, weights)).clamp(min=1e-9)
    total = torch.zeros(2, device=world.device)
    for number, codes in enumerate(batches, 1):
        sum_gradients_when_needed(model, is_last=number == len(batches))
        sums = stream_sums(model, model(codes, with_heads=False), codes, weights)
        losses = torch.stack([kind.loss for kind in sums]) / weight
        losses.sum().backward()
        total += losses.detach()
    text_loss, audio_loss = world.sum_over_data(total).tolist()
    return text_loss, audio_loss
