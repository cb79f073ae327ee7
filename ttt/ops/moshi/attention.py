"""Causal attention over whole sequences, with a window, and without a mask of all pairs.

Frame t sees the `context` frames t − context + 1 … t. Where that is the whole sequence, PyTorch's
own causal kernels do it. Shorter windows take a kernel that skips what lies outside (half precision
on CUDA, from Ampere on), or blocks of queries with the keys that they can see: time falls with the
window in both.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt.ops.compiler_marks import constant_result


def causal_attention(q: Tensor, k: Tensor, v: Tensor, context: int | None) -> Tensor:
    """softmax(q kᵀ / √D) v over the frames that each frame sees.

    Args:
        q, k, v: [B, T, H, D].
        context: frames that a frame sees, itself included; None: all before.

    Returns:
        [B, T, H, D].
    """
    if context is None or context >= q.shape[1]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if q.is_cuda and _suits_flash(q) and _has_flash(q.device):
        return _flash_window(q, k, v, context)
    return _blockwise(q, k, v, context)


def _suits_flash(q: Tensor) -> bool:
    """Return whether FlashAttention takes queries of this type and head width."""
    width = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


@constant_result
def _has_flash(device: torch.device) -> bool:
    """Return whether it runs on this device. Code that is compiled takes the answer as a
    constant."""
    return _capability(device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _flash_window(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """PyTorch's FlashAttention, whose window its public function does not offer."""
    num_frames = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, None, None, num_frames, num_frames, 0.0, True, False),
        window_size_left=context - 1,
        window_size_right=0,
    )[0]


def _blockwise(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    """Blocks of `context` queries, each with at most 2 · context − 1 keys: linear in T."""
    outputs = []
    for start in range(0, q.shape[1], context):
        end = min(start + context, q.shape[1])
        first = max(0, start - context + 1)
        distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(
            first, end, device=q.device
        )
        visible = (distance >= 0) & (distance < context)
        block = [x.transpose(1, 2) for x in (q[:, start:end], k[:, first:end], v[:, first:end])]
        out = F.scaled_dot_product_attention(block[0], block[1], block[2], attn_mask=visible)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)
