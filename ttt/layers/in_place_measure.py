"""The metrics measure an In-Place TTT layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt import ops
from ttt.config import TTTArgs
from ttt.layers.frames import delayed, only, relative_norm
from ttt.ops.in_place.sum import delta_norm_square
from ttt.ops.in_place.terms import product


def measure(
    args: TTTArgs,
    z: Tensor,
    v: Tensor,
    projection: Tensor | None,
    written: Tensor | None,
    is_frame: Tensor | None,
    plain: Tensor,
    learned: Tensor,
    *,
    beta: Tensor | None,
    base: Tensor,
) -> dict[str, Tensor]:
    """Return scalars that tell whether TTT does anything in a layer; see docs/mathematics.md.

    effect: ‖what TTT adds‖ / ‖what the projection gives‖, over the frames that can read: those
        after the first chunk. Without any, there is nothing to tell.
    delta: mean ‖change of S by a chunk‖ / ‖W0‖ over the complete chunks that write anything,
        decay aside, and that do not lie past the end of a recording.
    clip_rate: share of these chunks whose Δ met the bound; 0 without one.
    write_strength: β, with `write: delta` alone.

    Args:
        z, v, projection, written: [B, T, h], [B, T, d], [d, d] and [B, T], as the operators take
            them.
        is_frame: [B, T], false past the end of a recording; None: all are frames.
        plain, learned: [B, T, d], what the projection gives, and what TTT adds to it.
        beta: β; None with `write: sum`.
        base: [d, h], W0.
    """
    chunk_size = args.chunk_size
    readable = None if is_frame is None else is_frame[:, chunk_size:]
    if z.shape[1] <= chunk_size or (readable is not None and not readable.any()):
        return {}
    effect = relative_norm(learned[:, chunk_size:], plain[:, chunk_size:], readable)
    found = {"effect": effect}
    rate = args.inner_learning_rate
    v = v if projection is None else F.linear(v, projection)
    keys, v = delayed(z, args.lag_frames), only(v, written)
    if beta is not None:
        rate, found["write_strength"] = 1.0, beta.squeeze()
        keys = only(keys, written)
        v = _errors(args, keys, v, learned, beta)
    delta = delta_norm_square(keys, v, chunk_size).sqrt()
    if is_frame is not None:
        # With `chunk_edge: cut` padding is written as well, and nobody reads it.
        delta = only(delta.unsqueeze(-1), is_frame[:, ::chunk_size][:, : delta.shape[1]])[..., 0]
    num_writing = (delta > 0).sum().clamp(min=1)
    bound = args.max_delta_norm or float("inf")
    found["clip_rate"] = (delta > bound).sum() / num_writing
    delta = delta.clamp(max=bound)
    found["delta"] = rate * delta.sum() / num_writing / base.float().norm()
    return found


def _errors(args: TTTArgs, keys: Tensor, v: Tensor, learned: Tensor, beta: Tensor) -> Tensor:
    """E of whole sequences, [B, T, d], of what their frames have read."""
    size = args.chunk_size
    read = delayed(learned, args.lag_frames)
    errors: list[Tensor] = []
    for start in range(0, v.shape[1], size):
        here = slice(start, start + size)
        residual = v[:, here].float() - read[:, here]
        if errors and args.lag_frames:
            # These have read before the last chunk wrote.
            waiting = keys[:, start : start + args.lag_frames]
            change = product(errors[-1].to(keys.dtype).mT, keys[:, start - size : start])
            residual[:, : args.lag_frames] = (
                v[:, start : start + args.lag_frames]
                - args.state_decay * read[:, start : start + args.lag_frames].float()
                - waiting.float() @ change.float().mT
            )
        errors.append(ops.chunk_errors(keys[:, here], residual, beta))
    return torch.cat(errors, dim=1).to(v.dtype)
