"""TTT-Linear and TTT-MLP: per head, a small network learns to reconstruct while it reads.

The network f_W has one linear layer (TTT-Linear) or two with a tanh-GELU between (TTT-MLP). Of
every frame, ½ ‖LN(f_W(k)) − (v − k)‖² is to fall; a mini-batch of K frames shares the weights of
its start. With positions t, s inside it and `η[t, s] = token_scale[t] · eta[s]`, every linear layer
of inputs x̄ (of the query), x (of the keys) and gradients g at its outputs gives

    x̄ W + b − (η ⊙ tril(x̄ xᵀ + 1)) g                      (the dual form)

and after the mini-batch `W −= (η[K−1] ⊙ x)ᵀ g`, `b −= Σ η[K−1] g`. The `tril` makes it causal:
a frame is read with the gradients of its own and earlier frames.

Streaming uses the same pieces, of `inner_loop.pieces`: `inner_errors` (what frames write),
`inner_read`, `inner_write`.

Source: Sun et al. 2024, Learning to (Learn at Test Time); docs/mathematics.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt.ops.autocast import without_autocast
from ttt.ops.compiler_marks import uncompiled
from ttt.ops.inner_loop.layout import Layout, lay_out
from ttt.ops.inner_loop.pieces import (
    InnerLayers,
    inner_errors,
    inner_forward,
    inner_read,
    inner_write,
    layer_norm,
)

KERNEL_WIDTHS = (16, 32, 64, 128)
"""Of heads that the kernels take."""
SMALL_SIZE = 256
"""Mini-batches up to this size are computed whole, also in shorter sequences: there is little to
spare, and other products would round otherwise."""


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w: Tensor,
    b: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    scan_checkpoint_group_size: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """TTT-Linear on a sequence that starts at the start of a mini-batch.

    Args:
        q, k, v: [B, H, T, f], any T.
        eta: [B, H, T], inner learning rate of each frame.
        w: [H, f, f] or [B, H, f, f], the fast weights at the start; b: [H, f] or [B, H, f].
        ln_weight, ln_bias: [H, f], of the layer norm.
        token_scale: [K], how much of the mini-batch's step the frame at each position sees. Its
            length is the mini-batch size.
        scan_checkpoint_group_size: mini-batches whose intermediate results are kept together for
            the backward pass, and made again there; between groups only the fast weights are kept.
            None: keep everything.
        documents: [B, T] integers; a new document begins wherever the number changes. It starts
            from `w`, `b` and with a new mini-batch. None: every row is one document.

    Returns:
        The output [B, H, T, f] in the dtype of q, and the fast weights after the last complete
        mini-batch of each row, at least in float32: an incomplete one gives outputs but does not
        write.

    Raises:
        ValueError: a `scan_checkpoint_group_size` or a `token_scale` out of range.
    """
    out, ((w, b),) = inner_scan(
        q,
        k,
        v,
        eta,
        ((w, b),),
        ln_weight,
        ln_bias,
        token_scale=token_scale,
        scan_checkpoint_group_size=scan_checkpoint_group_size,
        documents=documents,
    )
    return out, (w, b)


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    scan_checkpoint_group_size: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """TTT-MLP: as `ttt_linear`, with two layers and their weights.

    Args:
        w1: [H, f, 4f], b1: [H, 4f], w2: [H, 4f, f], b2: [H, f]; or with a batch in front.

    Returns:
        The output [B, H, T, f], and (w1, b1, w2, b2).

    Raises:
        ValueError: see `ttt_linear`.
    """
    out, ((w1, b1), (w2, b2)) = inner_scan(
        q,
        k,
        v,
        eta,
        ((w1, b1), (w2, b2)),
        ln_weight,
        ln_bias,
        token_scale=token_scale,
        scan_checkpoint_group_size=scan_checkpoint_group_size,
        documents=documents,
    )
    return out, (w1, b1, w2, b2)


@torch.no_grad()
@without_autocast
def inner_losses(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    layers: InnerLayers,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
) -> dict[str, Tensor]:
    """½ ‖LN(f_W(k)) − (v − k)‖² by position: {name: [B, T']}, means over heads.

    Of the T' frames in complete mini-batches, with three weights: `initial`, those at the start of
    the sequence; `before` and `after` the update by the frame's own mini-batch. Shapes: see
    `ttt_linear`.
    """
    size = token_scale.shape[0]
    num_frames = k.shape[2] - k.shape[2] % size
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v, eta = (x[:, :, :num_frames].to(dtype) for x in (k, v, eta))
    ln_weight, ln_bias, token_scale = (x.to(dtype) for x in (ln_weight, ln_bias, token_scale))
    layers = tuple((w.to(dtype), b.to(dtype)) for w, b in layers)

    def losses(layers: InnerLayers, k: Tensor, v: Tensor) -> Tensor:
        found = layer_norm(inner_forward(layers, k)[1][-1], ln_weight, ln_bias)
        return 0.5 * (found - (v - k)).square().sum(-1).mean(1)

    initial, before, after = losses(layers, k, v), [], []
    for start in range(0, num_frames, size):
        here = slice(start, start + size)
        piece = k[:, :, here], v[:, :, here]
        before.append(losses(layers, *piece))
        written = inner_errors(layers, *piece, eta[:, :, here], ln_weight, ln_bias)
        layers = inner_write(layers, written, token_scale[-1])
        after.append(losses(layers, *piece))
    nothing = initial[:, :0]
    return {
        "initial": initial,
        "before": torch.cat([nothing, *before], dim=1),
        "after": torch.cat([nothing, *after], dim=1),
    }


# The scan over mini-batches -----------------------------------------------------------------------


@uncompiled
@without_autocast
def inner_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    layers: InnerLayers,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    scan_checkpoint_group_size: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, InnerLayers]:
    """`ttt_linear` or `ttt_mlp`, by the number of layers."""
    if scan_checkpoint_group_size is not None and scan_checkpoint_group_size < 1:
        raise ValueError(
            "scan_checkpoint_group_size: must be at least 1, or None, got "
            f"{scan_checkpoint_group_size}"
        )
    num_frames = q.shape[2]
    token_scale = _shortened(token_scale, num_frames)
    size = token_scale.numel()
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch = q.shape[0]
    layers = tuple(
        (w.to(dtype).expand(batch, *w.shape[-3:]), b.to(dtype).expand(batch, *b.shape[-2:]))
        for w, b in layers
    )
    if num_frames == 0:
        return q, layers
    layout = lay_out(num_frames, size, documents, like=q.new_empty(0, dtype=dtype))
    q, k, v, eta = (layout.spread(x, size) for x in (q, k, v, eta))
    ln_weight, ln_bias, token_scale = (x.to(dtype) for x in (ln_weight, ln_bias, token_scale))
    if documents is None and has_kernel(q, size, len(layers)):
        # Triton is imported where there is a use for it.
        from ttt.ops.inner_loop.scan_triton import scan

        out, layers = scan(
            q,
            k,
            v,
            eta.to(dtype),
            layers,
            ln_weight,
            ln_bias,
            token_scale=token_scale,
            num_writes=num_frames // size,
            group_size=scan_checkpoint_group_size,
        )
    else:
        out, layers = _scan(
            q,
            k,
            v,
            eta,
            layers,
            ln_weight,
            ln_bias,
            token_scale=token_scale,
            layout=layout,
            group_size=scan_checkpoint_group_size,
        )
    return layout.gather(out, num_frames), layers


def _shortened(token_scale: Tensor, num_frames: int) -> Tensor:
    """Return the scales of mini-batches that a sequence fills, or of one frame more than it has: a
    mini-batch that the sequence does not fill writes nothing, so a shorter one does as well that it
    does not fill either.

    Raises:
        ValueError: they are not [K], of at least one frame.
    """
    if token_scale.dim() != 1 or token_scale.numel() == 0:
        shape = list(token_scale.shape)
        raise ValueError(f"token_scale: must be [K], of at least one frame, got {shape}")
    least = max(num_frames, SMALL_SIZE)
    return token_scale if token_scale.numel() <= least else token_scale[: least + 1]


def kernel_sizes(num_layers: int) -> tuple[int, ...]:
    """Return the sizes of mini-batches that the kernels take."""
    return (16, 32, 64)[: 4 - num_layers]


def has_kernel(q: Tensor, size: int, num_layers: int) -> bool:
    """Return whether the kernels of `scan_triton` can take q [..., f] in mini-batches of `size`."""
    fits = size in kernel_sizes(num_layers) and q.shape[-1] in KERNEL_WIDTHS
    return fits and q.is_cuda and q.dtype != torch.float64


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    initial: InnerLayers,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    token_scale: Tensor,
    layout: Layout,
    group_size: int | None,
) -> tuple[Tensor, InnerLayers]:
    """`inner_scan` of frames laid out in mini-batches, [B, H, N, K, ·], by PyTorch's operators."""
    # Row t of the mask is scaled by token_scale[t].
    size = token_scale.numel()
    read_scale = token_scale[:, None] * token_scale.new_ones(size, size).tril()
    write_scale = (token_scale[-1] * layout.complete)[:, None, :, None, None]

    # Split and unbind, not slices: the gradient of a slice is as large as what it was cut from.
    frames = (q, k, v, eta, write_scale)
    pieces = [x.split(group_size or layout.num_mini_batches, dim=2) for x in frames]
    layers = initial
    first = 0
    outputs = []
    for piece in zip(*pieces, strict=True):
        last = first + piece[0].shape[2]
        arguments: Sequence[Any] = (
            *piece,
            None if layout.starts is None else layout.starts[:, first:last],
            read_scale,
            ln_weight,
            ln_bias,
            initial,
            layers,
        )
        first = last
        if group_size is None or not torch.is_grad_enabled():
            out, layers = _group(*arguments)
        else:
            out, layers = checkpoint(_group, *arguments, use_reentrant=False)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2), layers


def _group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    write_scale: Tensor,
    starts: Tensor | None,
    read_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    initial: InnerLayers,
    layers: InnerLayers,
) -> tuple[Tensor, InnerLayers]:
    """Some mini-batches one after the other.

    Args:
        q, k, v: [B, H, N, K, f]; eta: [B, H, N, K]; write_scale: [1 or B, 1, N, 1, 1].
        starts: [B, N], where to begin anew from `initial`.

    Returns:
        The output [B, H, N, K, f] in the dtype of q, and the weights afterwards.
    """
    dtype, out_dtype = read_scale.dtype, q.dtype
    # Here and not for the whole sequence: what is kept between groups stays as small as it came.
    q, k, v, eta = (x.to(dtype) for x in (q, k, v, eta))
    outputs = []
    mini_batches = zip(*(x.unbind(2) for x in (q, k, v, eta, write_scale)), strict=True)
    for n, (q_n, k_n, v_n, eta_n, write_scale_n) in enumerate(mini_batches):
        if starts is not None:
            layers = _where(starts[:, n], initial, layers)
        written = inner_errors(layers, k_n, v_n, eta_n, ln_weight, ln_bias)
        outputs.append(inner_read(layers, written, q_n, read_scale))
        layers = inner_write(layers, written, write_scale_n)
    z = torch.stack(outputs, dim=2)
    out = q + layer_norm(z, ln_weight[:, None], ln_bias[:, None])
    return out.to(out_dtype), layers


def _where(rows: Tensor, there: InnerLayers, elsewhere: InnerLayers) -> InnerLayers:
    """Rows [B] from one, the others from the other."""
    row = rows[:, None, None]
    return tuple(
        (torch.where(row[..., None], w, old_w), torch.where(row, b, old_b))
        for (w, b), (old_w, old_b) in zip(there, elsewhere, strict=True)
    )
