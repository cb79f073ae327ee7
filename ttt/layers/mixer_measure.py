"""The metrics measure a layer of TTT-Linear or TTT-MLP."""

import torch
from torch import Tensor

from ttt import ops
from ttt.layers.frames import relative_norm
from ttt.ops.inner_loop.pieces import InnerLayers


def measure(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    layers: InnerLayers,
    ln_weight: Tensor,
    ln_bias: Tensor,
    x: Tensor,
    update: Tensor,
    is_frame: Tensor | None,
    *,
    token_scale: Tensor,
) -> dict[str, Tensor]:
    """Return scalars that tell whether TTT does anything in a layer; see docs/mathematics.md.

    effect: ‖what TTT adds‖ / ‖what it is added to‖, over all frames of recordings.
    inner_loss_initial, _before, _after: means of `ops.inner_losses` over the mini-batches that
        recordings fill. Without any, there is nothing to tell.

    Args:
        k, v, eta, layers, ln_weight, ln_bias, token_scale: as the operators take them.
        x: [B, T, d], what the layer's `update` is added to.
        is_frame: [B, T], false past the end of a recording; None: all are frames.
    """
    if is_frame is None:
        is_frame = x.new_ones(x.shape[:2], dtype=torch.bool)
    if not is_frame.any():
        return {}
    found = {"effect": relative_norm(update, x, is_frame)}
    size = token_scale.shape[0]
    count = x.shape[1] // size
    by_mini_batch = is_frame[:, : count * size].unflatten(1, (count, size))
    is_filled = by_mini_batch.all(2).repeat_interleave(size, 1)
    if not is_filled.any():
        return found
    losses = ops.inner_losses(k, v, eta, layers, ln_weight, ln_bias, token_scale=token_scale)
    return found | {f"inner_loss_{name}": each[is_filled].mean() for name, each in losses.items()}
