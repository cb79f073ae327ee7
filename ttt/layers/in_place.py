"""The gated MLP of a Moshi layer, with an output projection that learns at test time."""

import math

import torch
import torch.nn.functional as F
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from torch import Tensor, nn

from ttt import ops
from ttt.config import MAX_WRITE_STRENGTH, TTTArgs
from ttt.layers.base import Cost, Place, TTTLayer
from ttt.layers.blocks import linear_of, project
from ttt.layers.frames import complete, delayed, inverse_square, normalized, only
from ttt.layers.in_place_measure import measure
from ttt.layers.in_place_state import InPlaceState
from ttt.ops.autocast import without_autocast
from ttt.ops.in_place.terms import PADDING, accumulating_dtype

GATE_SPEED = 10.0
"""How much faster than other parameters the gate learns: Adam's steps have a size of their own."""


class InPlaceGating(TTTLayer[InPlaceState]):
    """`o = (W0 + S) z`, where `z = act(gate x) * up x` and S is written chunk by chunk.

    Takes the place of a layer's `ActivationGating` and keeps its linear layers and their names, so
    that a stock checkpoint loads. Its own parameters are bare, so that nothing wraps them in LoRA:

        target_conv: [d, K], starts at zero: TTT then changes nothing, and the conv has a gradient.
        target_proj: [d, d], W_target, starts as the identity.
        target_gate: [1], with `lr_scale: relative` alone: starts at zero in place of the conv,
            which starts as the frame that lies farthest ahead.
        log_write_strength: [1], log β; with `write: delta` alone.

    Args:
        place: a layer with a gated MLP, to be taken over.
        args: the TTT configuration.
    """

    reads_open_chunk = False
    is_change = True

    def __init__(self, place: Place, args: TTTArgs):
        super().__init__(place, args)
        self.may_keep = args.keep_writes
        gating = place.block.gating
        assert isinstance(gating, ActivationGating)
        self.linear_in = gating.linear_in
        self.linear_out = gating.linear_out
        self.activation = gating.activation
        weight = self.base_weight
        self.hidden = weight.shape[1]
        self.target_conv = nn.Parameter(weight.new_empty(self.width, args.conv_kernel_size))
        self.target_proj = nn.Parameter(weight.new_empty(self.width, self.width))
        self.target_gate: nn.Parameter | None = None
        if args.lr_scale == "relative":
            self.target_gate = nn.Parameter(weight.new_empty(1))
        self.log_write_strength: nn.Parameter | None = None
        if args.write == "delta":
            self.log_write_strength = nn.Parameter(weight.new_empty(1))
        self.reset_parameters()

    @property
    def base_weight(self) -> Tensor:
        """[d, h], W0 without LoRA."""
        linear = self.linear_out
        return linear.frozen_W.weight if isinstance(linear, LoRALinear) else linear.weight

    def kept_linears(self) -> set[nn.Module]:
        # W0: the fast weights are a change of it, relative to its norm and measured against it, and
        # its own rounding would be larger than what a chunk writes.
        return {self.linear_out}

    def ttt_parameters(self) -> dict[str, nn.Parameter]:
        found = {"target_conv": self.target_conv, "target_proj": self.target_proj}
        if self.target_gate is not None:
            found["target_gate"] = self.target_gate
        if self.log_write_strength is not None:
            found["log_write_strength"] = self.log_write_strength
        return found

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity projection, β at `write_strength`, and one zero: the conv or, if there is one,
        the gate. Never zero two: no gradient would ever flow."""
        self.target_conv.zero_()
        if self.target_gate is not None:
            self.target_conv[:, -1] = 1.0
            self.target_gate.zero_()
        if not self.target_proj.is_meta:
            nn.init.eye_(self.target_proj)
        if self.log_write_strength is not None:
            self.log_write_strength.fill_(math.log(self.args.write_strength))

    @property
    def divides_by_keys(self) -> bool:
        """Return whether frames are written with the key z / ‖z‖²; `write: delta` divides by
        itself."""
        return self.args.lr_scale == "relative" and self.args.write == "sum"

    @property
    def gated_conv(self) -> Tensor:
        """[d, K], the conv with the gate in it."""
        if self.target_gate is None:
            return self.target_conv
        return GATE_SPEED * self.target_gate * self.target_conv

    @property
    def write_strength(self) -> Tensor | None:
        """[1], β, at most `MAX_WRITE_STRENGTH` and at least in float32; None with `write: sum`."""
        if self.log_write_strength is None:
            return None
        log = self.log_write_strength.to(accumulating_dtype(self.log_write_strength.dtype))
        # At the bound the gradient passes on, so that β can come back.
        excess = (log - math.log(MAX_WRITE_STRENGTH)).clamp(min=0).detach()
        return (log - excess).exp()

    @property
    def lag(self) -> int:
        """Return how many frames a key waits for its target."""
        return self.args.lag_frames

    @property
    def num_behind(self) -> int:
        """Frames before its own that a target is made of."""
        return self.args.conv_kernel_size - 1 - self.args.lookahead_frames

    @property
    def tail(self) -> int:
        """Frames of the chunk before that the conv reaches back to."""
        return self.args.conv_kernel_size - 1 if self.args.carries else 0

    def forward(
        self, x: Tensor, token_embeddings: Tensor | None, is_frame: Tensor | None
    ) -> Tensor:
        """Return the MLP's output, [B, T, d]; see `TTTLayer.forward`.

        Frames past the end of a recording are no targets, and those whose targets they are part of
        are not written. Target `hidden` reads no embeddings.
        """
        source = x if self.args.target == "hidden" else token_embeddings
        if not self.active:
            return self.linear_out(self._activations(x))
        assert source is not None
        if (state := self._streaming_state) is not None:
            z = self._activations(x)
            learned, plain = self._stream(z, source, is_frame, state), self.linear_out(z)
            self.note_effect(learned, plain)
            return plain + learned
        z, source = self.execution.piece(
            InPlaceGating._prepare, self, x, source, keeps_products_alone=True
        )
        written = complete(is_frame, self.lag) if self.args.carries else None
        learned = self._learn(z, source, written)
        # At last: activation checkpointing then does not make it again.
        plain = project(z, linear_of(self.linear_out))
        projection = None if self.log_write_strength is None else self.target_proj
        seen = z, source, projection, written, is_frame, plain, learned
        # β is made within: as a part of the graph it would come after what comes last.
        self.measure_once(
            lambda: measure(self.args, *seen, beta=self.write_strength, base=self.base_weight)
        )
        return plain + learned

    def _activations(self, x: Tensor) -> Tensor:
        """z, [B, T, h]."""
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return self.activation(gate) * up

    def _scaled(self, source: Tensor) -> Tensor:
        """Return what the targets are made of, as `lr_scale` has it."""
        return source if self.target_gate is None else normalized(source)

    def _prepare(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """z and the targets v of whole sequences; with `delta`, what these are a projection of."""
        z, source = self._activations(x), self._scaled(source)
        if self.log_write_strength is not None:
            return z, self._mixed(source)
        v = self._targets(source)
        if self.divides_by_keys:
            v = v * delayed(inverse_square(z), self.lag).to(v.dtype)
        return z, v

    def _learn(self, z: Tensor, source: Tensor, written: Tensor | None) -> Tensor:
        """S z of whole sequences, [B, T, d], of what `_prepare` returns."""
        chunk_size, decay = self.args.chunk_size, self.args.state_decay
        if (beta := self.write_strength) is not None:
            return ops.in_place_delta(
                z,
                source,
                beta=beta,
                chunk_size=chunk_size,
                decay=decay,
                lag=self.lag,
                written=written,
                projection=self.target_proj,
            )
        return ops.in_place_ttt(
            z,
            only(source, written),
            lr=self.args.inner_learning_rate,
            chunk_size=chunk_size,
            max_delta_norm=self.args.max_delta_norm,
            decay=decay,
            lag=self.lag,
        )

    @without_autocast
    def _targets(self, source: Tensor) -> Tensor:
        """v = W_target · conv(source), [B, T, d]: the target that is complete at each frame."""
        return F.linear(self._mixed(source), self.target_proj)

    def _mixed(self, source: Tensor) -> Tensor:
        """conv(source), [B, T, d]."""
        if self.args.carries:
            return ops.causal_conv(source, self.gated_conv)
        size, lookahead = self.args.chunk_size, self.args.lookahead_frames
        return ops.chunk_conv(source, self.gated_conv, chunk_size=size, lookahead=lookahead)

    # What is asked of it ---------------------------------------------------------------------

    @classmethod
    def cost(cls, args: TTTArgs) -> Cost:
        # Beside what all targets keep: the input of the MLP and its scale.
        own = 17e3 if args.target == "hidden" else 0.0
        # 56 kB by `delta` with target `hidden`; others keep no more, and were not measured.
        if args.write == "sum":
            return Cost(1.03, 30e3 + own, 0.0, 1.03, 56e3)
        # E is kept in two terms of 16 bits, and the inverses.
        again = 4 * (4096 * (1 + PADDING / args.chunk_size) + args.chunk_size)
        time_factor, again = (1.04, again) if args.keep_writes else (1.05, 0.0)
        return Cost(time_factor, 30e3 + own, 0.0, 1.043, 56e3, again)

    @classmethod
    def how_to_strengthen(cls, args: TTTArgs) -> str:
        if not args.has_fixed_step:
            return ""
        step = f"raise ttt.learning_rate (now {args.inner_learning_rate:g})"
        return f"set ttt.lr_scale: relative, or {step}" if args.lr_scale == "none" else step

    @classmethod
    def how_to_weaken(cls, args: TTTArgs) -> str:
        if not args.has_fixed_step:
            return ""
        return (
            "with write: sum, what all chunks have in common, such as padding and silence, adds "
            "up: set ttt.write: delta or ttt.state_decay, lower ttt.learning_rate (now "
            f"{args.inner_learning_rate:g})"
        )

    def describe(self) -> str:
        args, details = self.args, str(self.args.write)
        if args.has_fixed_step:
            # One number means something else in each form.
            scale = {"relative": "relative", "none": "not scaled"}[args.lr_scale]
            details += f", {scale}, learning rate {args.inner_learning_rate:g}"
        return f"{super().describe()} ({details})"

    def write_gates(self) -> list[nn.Parameter]:
        # With a conv of zeros all targets are zero, whatever the rule.
        return [self.target_conv]

    # Streaming -------------------------------------------------------------------------------

    def _init_streaming_state(self, batch_size: int) -> InPlaceState:
        weight = self.base_weight
        size, width = self.args.chunk_size, self.width
        dtype = accumulating_dtype(weight.dtype)
        is_delta = self.log_write_strength is not None
        return InPlaceState(
            batch_size,
            weight.device,
            change=weight.new_zeros(batch_size, width, self.hidden, dtype=dtype),
            pending_z=weight.new_zeros(batch_size, self.lag + size, self.hidden),
            pending_source=weight.new_zeros(batch_size, self.tail + size, width),
            pending_read=weight.new_zeros(batch_size, self.lag + size, width, dtype=dtype)
            if is_delta
            else None,
            num_pending=torch.zeros(batch_size, dtype=torch.long, device=weight.device),
        )

    def start_weights(self) -> list[Tensor]:
        return [self.base_weight]

    def open_frames(self) -> Tensor:
        state = self._streaming_state
        assert state is not None, "only a stream has an open chunk"
        return state.num_pending

    @torch.no_grad()
    @without_autocast
    def _stream(
        self, z: Tensor, source: Tensor, is_frame: Tensor | None, state: InPlaceState
    ) -> Tensor:
        """S z of T more frames, [B, T, d], and zero in rows that are switched off; rows may differ
        in position."""
        stream = self._stream_frame if z.is_cuda and z.shape[1] == 1 else self._stream_frames
        return stream(z, source, is_frame if self.args.carries else None, state)

    def _stream_frames(
        self, z: Tensor, source: Tensor, is_frame: Tensor | None, state: InPlaceState
    ) -> Tensor:
        outputs, start, num_frames = [], 0, z.shape[1]
        source = self._scaled(source)
        key = z * inverse_square(z).to(z.dtype) if self.divides_by_keys else z
        while start < num_frames:
            # As many frames as no row's chunk ends before.
            length = min(num_frames - start, self.args.chunk_size - int(state.num_pending.max()))
            piece = slice(start, start + length)
            query = z[:, piece].to(state.change.dtype)
            outputs.append(torch.bmm(query, state.change.transpose(1, 2)))
            present = None if is_frame is None else is_frame[:, piece]
            self._append(key[:, piece], source[:, piece], outputs[-1], present, state)
            self._write_complete_chunks(state)
            start += length
        return self.in_rows_on(torch.cat(outputs, dim=1).to(z.dtype))

    def _stream_frame(
        self, z: Tensor, source: Tensor, is_frame: Tensor | None, state: InPlaceState
    ) -> Tensor:
        """Stream one frame, and ask nothing of the device: a CUDA graph can hold it."""
        from ttt.ops.in_place.stream import stream_frame

        # Triton launches on the current device.
        with torch.cuda.device_of(z):
            return stream_frame(
                z,
                source,
                is_frame,
                change=state.change,
                pending_z=state.pending_z,
                pending_source=state.pending_source,
                pending_read=state.pending_read,
                num_pending=state.num_pending,
                exec_mask=state.exec_mask,
                rows_on=state.rows_on,
                conv=self.target_conv,
                gate=self.target_gate,
                gate_speed=GATE_SPEED,
                projection=self.target_proj,
                num_behind=0 if self.args.carries else self.num_behind,
                lag=self.lag,
                decay=self.args.state_decay,
                lr=self.args.inner_learning_rate,
                max_delta_norm=self.args.max_delta_norm,
                log_beta=self.log_write_strength,
                max_beta=MAX_WRITE_STRENGTH,
                divides_by_keys=self.divides_by_keys,
            )

    def _append(
        self, z: Tensor, source: Tensor, read: Tensor, is_frame: Tensor | None, state: InPlaceState
    ) -> None:
        """Keep frames of the open chunk. A paused row's land where its next ones will."""
        positions = state.num_pending[:, None] + torch.arange(z.shape[1], device=z.device)
        for buffer, offset, new in (
            (state.pending_z, self.lag, z),
            (state.pending_source, self.tail, source),
            (state.pending_read, self.lag, read),
        ):
            if buffer is not None:
                index = (offset + positions)[:, :, None].expand(-1, -1, buffer.shape[-1])
                buffer.scatter_(1, index, new.to(buffer.dtype))
        if is_frame is not None and len(absent := (state.learns[:, None] & ~is_frame).nonzero()):
            # Their own keys, and those that they would be part of the targets of.
            rows, frames = absent.T
            places = positions[rows, frames, None] + torch.arange(self.lag + 1, device=z.device)
            state.pending_z[rows[:, None], places] = 0
        state.num_pending += z.shape[1] * state.learns

    def _write_complete_chunks(self, state: InPlaceState) -> None:
        beta, size = self.write_strength, self.args.chunk_size
        for row in (state.num_pending == size).nonzero().flatten().tolist():
            here = slice(row, row + 1)
            keys = state.pending_z[here, :size]
            v = self._targets(state.pending_source[here])[:, self.tail :]
            if beta is None:
                delta = ops.chunk_delta(keys, v, max_delta_norm=self.args.max_delta_norm)
                delta = self.args.inner_learning_rate * delta
            else:
                assert state.pending_read is not None
                errors = ops.chunk_errors(keys, v - state.pending_read[here, :size], beta)
                delta = errors.mT @ keys.to(errors.dtype)
            change = state.change[here].mul_(self.args.state_decay).add_(delta)
            self._carry_over(here, change, state)
            state.num_pending[row] = 0

    def _carry_over(self, row: slice, change: Tensor, state: InPlaceState) -> None:
        """Move what the next chunk needs of a row's last one to where it looks for it."""
        size = self.args.chunk_size
        for buffer, length in ((state.pending_z, self.lag), (state.pending_source, self.tail)):
            buffer[row, :length] = buffer[row, size : size + length].clone()
        if state.pending_read is not None:
            waiting = state.pending_z[row, : self.lag].to(change.dtype)
            state.pending_read[row, : self.lag] = waiting @ change.mT
