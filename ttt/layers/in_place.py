"""The gated MLP of a Moshi layer, with an output projection that learns at test time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from moshi.modules.streaming import State, StreamingModule
from torch import Tensor, nn

from ttt import ops
from ttt.config import TTTArgs
from ttt.ops.in_place import delta_norm_square, number_chunks


@dataclass
class InPlaceState(State):
    """What one layer has learnt in each row's stream, and the frames not yet written.

    Every tensor keeps its address: stock `LMGen` captures the step in a CUDA graph.
    """

    change: Tensor
    """[B, d, h], η ΣΔ: what the fast weights add to the projection W0. In float32 (float64 in a
    float64 model), apart from W0: a small Δ added to a bfloat16 W0 would lose half of itself."""
    pending_z: Tensor
    """[B, C, h], activations of the open chunk."""
    pending_source: Tensor
    """[B, C, d], what the targets of the open chunk are made of."""
    num_pending: Tensor
    """[B], frames in the open chunk, 0 to C - 1."""

    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        self.change.masked_fill_(reset_mask.view(-1, 1, 1), 0.0)
        self.num_pending.masked_fill_(reset_mask, 0)


class InPlaceGating(StreamingModule[InPlaceState]):
    """`o = W0 z + η Σ Δ z`, where `z = act(gate x) * up x` and Δ is written chunk by chunk.

    Takes the place of a layer's `ActivationGating` and keeps its linear layers and their names, so
    that a stock checkpoint loads. Its own parameters are bare, so that nothing wraps them in LoRA:

        target_conv: [d, K], starts at zero: TTT then changes nothing, and the conv has a gradient.
        target_proj: [d, d], W_target, starts as the identity.

    Args:
        gating: the stock module to take over.
        args: the TTT configuration.
    """

    def __init__(self, gating: ActivationGating, args: TTTArgs):
        super().__init__()
        self.linear_in = gating.linear_in
        self.linear_out = gating.linear_out
        self.activation = gating.activation
        self.args = args
        weight = self.base_weight
        self.width, self.hidden = weight.shape
        self.target_conv = nn.Parameter(weight.new_empty(self.width, args.conv_kernel_size))
        self.target_proj = nn.Parameter(weight.new_empty(self.width, self.width))
        self.reset_parameters()
        self.measure = False
        """Whether parallel forward passes fill `measured`; see `ttt.measuring`."""
        self.measured: dict[str, Tensor] = {}

    @property
    def base_weight(self) -> Tensor:
        """[d, h], W0 without LoRA."""
        linear = self.linear_out
        return linear.frozen_W.weight if isinstance(linear, LoRALinear) else linear.weight

    def ttt_parameters(self) -> dict[str, nn.Parameter]:
        return {"target_conv": self.target_conv, "target_proj": self.target_proj}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero conv, identity projection. Never zero both: no gradient would ever flow."""
        self.target_conv.zero_()
        if not self.target_proj.is_meta:
            nn.init.eye_(self.target_proj)

    def forward(self, x: Tensor, token_embeddings: Tensor) -> Tensor:
        """
        Args:
            x: [B, T, d], the layer's normalised input to its MLP.
            token_embeddings: [B, T, d], see `TTTLMModel.forward_text`; unused by target `hidden`.

        Returns:
            [B, T, d].
        """
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        z = self.activation(gate) * up
        source = x if self.args.target == "hidden" else token_embeddings
        plain = self.linear_out(z)
        if self._streaming_state is not None:
            return plain + self._stream(z, source, self._streaming_state)
        v = self._targets(source)
        learnt = ops.in_place_ttt(
            z,
            v,
            lr=self.args.learning_rate,
            chunk_size=self.args.chunk_size,
            max_delta_norm=self.args.max_delta_norm,
        )
        if self.measure and x.shape[1] > self.args.chunk_size:
            self.measured = self._measure(z, v, plain, learnt)
        return plain + learnt

    def _targets(self, source: Tensor) -> Tensor:
        """v = W_target · conv(source), [B, T, d]."""
        mixed = ops.chunk_conv(
            source,
            self.target_conv,
            chunk_size=self.args.chunk_size,
            lookahead=self.args.lookahead_frames,
        )
        return F.linear(mixed, self.target_proj)

    @torch.no_grad()
    def _measure(self, z: Tensor, v: Tensor, plain: Tensor, learnt: Tensor) -> dict[str, Tensor]:
        """Scalars that tell whether TTT does anything here; see docs/mathematics.md.

        effect: ‖what TTT adds‖ / ‖what the projection gives‖, over the frames that can read.
        delta: mean ‖η Δ‖ / ‖W0‖ over the complete chunks that write anything (padding does not).
        clip_rate: share of these chunks whose Δ met the bound.
        """
        chunk_size = self.args.chunk_size
        readable = slice(chunk_size, None)
        effect = learnt[:, readable].float().norm() / plain[:, readable].float().norm()
        chunks = number_chunks(z.shape[1], chunk_size, None, device=z.device)
        delta = delta_norm_square(z, v, chunks)[:, chunk_size - 1 :: chunk_size].sqrt()
        num_writing = (delta > 0).sum().clamp(min=1)
        bound = self.args.max_delta_norm or float("inf")
        clip_rate = (delta > bound).sum() / num_writing
        delta = delta.clamp(max=bound)
        base = self.base_weight.float().norm()
        return {
            "effect": effect,
            "delta": self.args.learning_rate * delta.sum() / num_writing / base,
            "clip_rate": clip_rate,
        }

    # Streaming -------------------------------------------------------------------------------

    def _init_streaming_state(self, batch_size: int) -> InPlaceState:
        weight = self.base_weight
        chunk_size = self.args.chunk_size
        return InPlaceState(
            batch_size,
            weight.device,
            change=weight.new_zeros(
                batch_size,
                self.width,
                self.hidden,
                dtype=torch.promote_types(weight.dtype, torch.float32),
            ),
            pending_z=weight.new_zeros(batch_size, chunk_size, self.hidden),
            pending_source=weight.new_zeros(batch_size, chunk_size, self.width),
            num_pending=torch.zeros(batch_size, dtype=torch.long, device=weight.device),
        )

    @torch.no_grad()
    def _stream(self, z: Tensor, source: Tensor, state: InPlaceState) -> Tensor:
        """What the fast weights add to T more frames, [B, T, d]; rows may differ in position."""
        num_frames = z.shape[1]
        outputs = []
        start = 0
        while start < num_frames:
            # As many frames as no row's chunk ends before. A single frame always fits, and then
            # nothing is asked of the device: a CUDA graph can hold it.
            length = num_frames - start
            if length > 1:
                length = min(length, self.args.chunk_size - int(state.num_pending.max()))
            piece = slice(start, start + length)
            query = z[:, piece].to(state.change.dtype)
            outputs.append(torch.bmm(query, state.change.transpose(1, 2)))
            self._append(z[:, piece], source[:, piece], state)
            self._write_complete_chunks(state)
            start += length
        return torch.cat(outputs, dim=1).to(z.dtype)

    def _append(self, z: Tensor, source: Tensor, state: InPlaceState) -> None:
        """Keep frames of the open chunk. A paused row's land where its next ones will."""
        num_frames = z.shape[1]
        positions = state.num_pending[:, None] + torch.arange(num_frames, device=z.device)
        for buffer, new in ((state.pending_z, z), (state.pending_source, source)):
            index = positions[:, :, None].expand(-1, -1, buffer.shape[-1])
            buffer.scatter_(1, index, new.to(buffer.dtype))
        state.num_pending += num_frames * state.exec_mask

    def _write_complete_chunks(self, state: InPlaceState) -> None:
        complete = state.num_pending == self.args.chunk_size
        # Within a CUDA graph nothing can be asked of the device: then every frame pays for the
        # update, which is zero in the rows that are not at the end of their chunk.
        capturing = complete.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not bool(complete.any()):
            return
        rows = complete[:, None, None]
        v = self._targets(state.pending_source)
        delta = ops.chunk_delta(
            torch.where(rows, state.pending_z, 0.0).to(state.change.dtype),
            torch.where(rows, v, 0.0).to(state.change.dtype),
            max_delta_norm=self.args.max_delta_norm,
        )
        state.change.add_(delta, alpha=self.args.learning_rate)
        state.num_pending.masked_fill_(complete, 0)
