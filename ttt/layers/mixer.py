"""A layer of its own, between attention and MLP, whose heads learn at test time."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import create_norm_fn
from torch import Tensor, nn

from ttt import ops
from ttt.config import TTTArgs
from ttt.layers.blocks import norm_of, normalize
from ttt.layers.conv_tail import ConvTail
from ttt.layers.execution import Execution
from ttt.layers.streamed import Streamed
from ttt.ops.inner_loop.pieces import (
    InnerLayers,
    Written,
    flatten,
    inner_errors,
    inner_read,
    inner_write,
    layer_norm,
)
from ttt.ops.inner_loop.ttt_linear_mlp import has_kernel, inner_scan

INIT_STD = 0.02
MLP_INIT_STD = 0.1
"""Of TTT-MLP's inner weights, behind convolutions. With 0.02 its hidden units hardly bend, and all
of them write the same."""
GROUP_SIZE = 16
"""`scan_checkpoint_group_size`, where a layer's or all layers' share would be much at once."""


@dataclass
class TTTMixerState(State):
    """The fast weights of each row's stream, and what the open mini-batch will write.

    Every tensor keeps its address: stock `LMGen` captures the step in a CUDA graph. All are in
    float32 (float64 in a float64 model).
    """

    layers: InnerLayers
    """Per inner layer W [B, H, in, out] and b [B, H, out], at the open mini-batch's start."""
    written: Written
    """Per inner layer its inputs [B, H, K, in] and errors [B, H, K, out]; places from
    `num_pending` on hold nothing of meaning."""
    num_pending: Tensor
    """[B], frames in the open mini-batch, 0 to K - 1."""
    initial: InnerLayers
    """The learnt weights that a stream starts from: the module's parameters, without B."""
    tail: ConvTail | None
    """What the convolutions look back to; None: there are none."""

    def tensors(self) -> dict[str, Tensor]:
        """All that a stream depends on, by name."""
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
        for fast, start in zip(flatten(self.layers), flatten(self.initial), strict=True):
            rows = reset_mask.view(-1, *(1 for _ in start.shape))
            fast.copy_(torch.where(rows, start.to(fast.dtype), fast))
        # Nothing reads these before they are written again, but 0 · NaN would be NaN.
        for pending in flatten(self.written):
            pending.masked_fill_(reset_mask.view(-1, 1, 1, 1), 0.0)
        self.num_pending.masked_fill_(reset_mask, 0)
        if self.tail is not None:
            self.tail.reset(reset_mask)


class TTTMixer(Streamed, StreamingModule[TTTMixerState]):
    """`tanh(α) ⊙ out_proj · TTT(norm(x))`, to be added to x.

    TTT is `ops.ttt_linear` or `ops.ttt_mlp`, by head, of queries, keys and values that are
    projections of norm(x). All parameters but the norm's are bare, so that nothing wraps them in
    LoRA:

        in_proj: [2d, d], what queries and keys are made of, and values; without convolutions
            [3d, d], queries, keys and values.
        conv_q, conv_k: [d, qk_conv_kernel_size], of queries and keys; not there if that is 1. At
            the start a query is the frame's own, and a key that of the frame before.
        out_proj: [d, d], starts at zero: TTT then changes nothing, and this has a gradient.
        gate: [d], α, starts at `gate_init`. Never zero both: no gradient would ever flow.
        inner_w1, inner_b1 (and 2 with `mlp`): [H, in, out], [H, out], the fast weights' start.
        inner_norm_weight, inner_norm_bias: [H, f], of the layer norm inside the loop.
        lr_weight, lr_bias: [H, d], [H], of the frames' inner learning rate
            base_lr · sigmoid(lr_weight · norm(x) + lr_bias) / f.
        token_offset: [K], of what the frame at position t sees of the mini-batch's step,
            max(0, 1/(t+1) + token_offset[t]).

    Args:
        width: d.
        num_heads: H; a head is f = d / H wide.
        norm: the kind of norm, as `LMModel` names it.
        args: the TTT configuration; its `num_heads` replaces H.

    Raises:
        ValueError: heads that do not divide d, or an odd f with RoPE.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        norm: str,
        args: TTTArgs,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.args = args
        num_heads = args.num_heads or num_heads
        if width % num_heads:
            raise ValueError(
                f"ttt.num_heads: {num_heads} heads do not divide this model's width, {width}."
            )
        self.num_heads, self.head_width = num_heads, width // num_heads
        f, size = self.head_width, args.mini_batch_size
        if args.use_rope and f % 2:
            raise ValueError(
                f"ttt.use_rope: needs an even head width, and this model's is {f}; set it to false."
            )

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        # In the type of the model's weights, as all norms of a loaded model are.
        self.norm = create_norm_fn(norm, width, device=device, dtype=dtype).to(dtype)
        kernel = args.qk_conv_kernel_size
        self.in_proj = new((2 if kernel > 1 else 3) * width, width)
        if kernel > 1:
            self.conv_q, self.conv_k = new(width, kernel), new(width, kernel)
        self.out_proj = new(width, width)
        self.gate = new(width)
        inner_widths = [f, f] if args.method == "linear" else [f, 4 * f, f]
        self.num_inner_layers = len(inner_widths) - 1
        for index, (inputs, outputs) in enumerate(pairwise(inner_widths), 1):
            self.register_parameter(f"inner_w{index}", new(num_heads, inputs, outputs))
            self.register_parameter(f"inner_b{index}", new(num_heads, outputs))
        self.inner_norm_weight, self.inner_norm_bias = new(num_heads, f), new(num_heads, f)
        self.lr_weight, self.lr_bias = new(num_heads, width), new(num_heads)
        self.token_offset = new(size)
        self.reset_parameters()
        self.active = True
        """Whether its layer uses it; see `ttt.without_ttt`."""
        self.execution = Execution()
        self.measure = False
        """Whether parallel forward passes fill `measured`; see `ttt.measuring`."""
        self.measured: dict[str, Tensor] = {}

    @property
    def inner_layers(self) -> InnerLayers:
        """The learnt start of the fast weights."""
        return tuple(
            (getattr(self, f"inner_w{index}"), getattr(self, f"inner_b{index}"))
            for index in range(1, 1 + self.num_inner_layers)
        )

    def ttt_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of training: see the class; the rest as in the paper."""
        has_conv = self.args.qk_conv_kernel_size > 1
        inner_std = MLP_INIT_STD if has_conv and self.args.method == "mlp" else INIT_STD
        for name, parameter in self.named_parameters():
            if name.startswith("inner_w") or name == "lr_weight":
                nn.init.normal_(parameter, std=inner_std if name != "lr_weight" else INIT_STD)
            elif name in ("norm.alpha", "norm.weight", "inner_norm_weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        # Queries and keys of unit size at any width.
        nn.init.normal_(self.in_proj, std=self.in_proj.shape[1] ** -0.5)
        if has_conv:
            # What followed a frame is found where the frame comes again: q_t meets k_s where frame
            # t is as frame s - 1 was, with v_s.
            self.conv_q[:, -1] = 1.0
            self.conv_k[:, -2] = 1.0
        self.gate.fill_(self.args.gate_init)

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: [B, T, d], the residual stream after attention.

        Returns:
            [B, T, d], to be added to it.
        """
        state = self._streaming_state
        if state is not None:
            mixed = self._stream(*self._prepare(x), state)
            return self.streamed(self._finish(mixed, x), x)
        q, k, v, eta, token_scale = self.execution.piece(TTTMixer._prepare, self, x)
        mixed, _ = inner_scan(
            q,
            k,
            v,
            eta,
            self.inner_layers,
            self.inner_norm_weight,
            self.inner_norm_bias,
            token_scale=token_scale,
            scan_checkpoint_group_size=self._scan_checkpoint_group_size(q),
        )
        update = self.execution.piece(TTTMixer._finish, self, mixed, x)
        if self.measure:
            effect = update.detach().float().norm() / x.detach().float().norm()
            losses = self._inner_losses(k, v, eta, token_scale)
            self.measured = {"effect": effect, **losses}
            # Once: activation checkpointing and micro-batches come here again.
            self.measure = False
        return update

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, f], and the learning rates."""
        norm = norm_of(self.norm)
        normed = x if norm is None else normalize(x, norm)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
            for y in self._project(normed)
        )
        if self.args.use_rope:
            positions = self._positions(x.shape[1], x.device)
            # Rounded once, as attention's are: the scan is fastest in the type of the values.
            q = ops.rope(q, positions, theta=self.args.rope_theta).to(v.dtype)
            k = ops.rope(k, positions, theta=self.args.rope_theta).to(v.dtype)
        return q, k, v, *self._learning_rates(normed)

    def _project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, T, d]."""
        projected = F.linear(normed, self.in_proj)
        if self.args.qk_conv_kernel_size == 1:
            q, k, v = projected.chunk(3, dim=-1)
            return q, k, v
        shared, v = projected.chunk(2, dim=-1)
        state = self._streaming_state
        before = None
        if state is not None and state.tail is not None:
            before = state.tail.pass_by(shared, state.exec_mask)
        q, k = (ops.short_conv(shared, w, before=before) for w in (self.conv_q, self.conv_k))
        return q, k, v

    def _scan_checkpoint_group_size(self, q: Tensor) -> int | None:
        """As the operators take it: None keeps everything. What the kernels keep, one layer can
        keep whole; without them it would be all weights of all mini-batches too."""
        size = self.args.scan_checkpoint_group_size
        kept_whole = self.execution.makes_layers_again and has_kernel(
            q, self.args.mini_batch_size, self.num_inner_layers
        )
        return GROUP_SIZE if size is None and not kept_whole else size

    def _finish(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Return what is added to x, of the operator's [B, H, T, f]."""
        mixed = mixed.to(x.dtype).transpose(1, 2).flatten(2)
        return torch.tanh(self.gate) * F.linear(mixed, self.out_proj)

    def _positions(self, num_frames: int, device: torch.device) -> Tensor:
        """[1 or B, T], of the next frames inside their mini-batches, counted from the start of the
        stream."""
        positions = torch.arange(num_frames, device=device)[None]
        if self._streaming_state is not None:
            positions = positions + self._streaming_state.num_pending[:, None]
        return positions % self.args.mini_batch_size

    def _learning_rates(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Of each frame [B, H, T] and each position [K], at least in float32."""
        dtype = torch.promote_types(normed.dtype, torch.float32)
        gate = F.linear(normed, self.lr_weight, self.lr_bias).to(dtype).transpose(1, 2)
        eta = self.args.inner_base_lr * torch.sigmoid(gate) / self.head_width
        size = self.args.mini_batch_size
        shares = 1 / torch.arange(1, size + 1, device=normed.device, dtype=dtype)
        return eta, (shares + self.token_offset.to(dtype)).clamp(min=0)

    def _inner_losses(
        self, k: Tensor, v: Tensor, eta: Tensor, token_scale: Tensor
    ) -> dict[str, Tensor]:
        """Means over complete mini-batches of the loss that TTT lowers, with the weights that a
        sequence starts from, and before and after the update by a frame's own mini-batch. None, if
        the sequence is shorter than a mini-batch."""
        if k.shape[2] < self.args.mini_batch_size:
            return {}
        by_position = ops.inner_losses(
            k,
            v,
            eta,
            self.inner_layers,
            self.inner_norm_weight,
            self.inner_norm_bias,
            token_scale=token_scale,
        )
        return {f"inner_loss_{name}": losses.mean() for name, losses in by_position.items()}

    # Streaming -------------------------------------------------------------------------------

    def start_weights(self) -> list[Tensor]:
        return list(flatten(self.inner_layers))

    def _init_streaming_state(self, batch_size: int) -> TTTMixerState:
        size, initial = self.args.mini_batch_size, self.inner_layers
        dtype = torch.promote_types(self.in_proj.dtype, torch.float32)

        def rows(parameter: Tensor) -> Tensor:
            return parameter.detach().to(dtype).repeat(batch_size, *(1 for _ in parameter.shape))

        def pending(width: int) -> Tensor:
            shape = (batch_size, self.num_heads, size, width)
            return torch.zeros(shape, dtype=dtype, device=self.in_proj.device)

        tail = None
        if self.args.qk_conv_kernel_size > 1:
            kept = self.args.qk_conv_kernel_size - 1
            tail = ConvTail.new(batch_size, kept, like=self.in_proj)
        return TTTMixerState(
            batch_size,
            self.in_proj.device,
            layers=tuple((rows(w), rows(b)) for w, b in initial),
            written=tuple((pending(w.shape[1]), pending(w.shape[2])) for w, _ in initial),
            num_pending=torch.zeros(batch_size, dtype=torch.long, device=self.in_proj.device),
            initial=initial,
            tail=tail,
        )

    def state_bytes(self, batch_size: int) -> int:
        """Of the tensors in a streaming state."""
        size = torch.promote_types(self.in_proj.dtype, torch.float32).itemsize
        values = sum(w.numel() + b.numel() for w, b in self.inner_layers)
        pending = sum(w.shape[1] + w.shape[2] for w, _ in self.inner_layers)
        values += self.num_heads * self.args.mini_batch_size * pending
        tail = self.args.qk_conv_kernel_size - 1
        tail_bytes = ConvTail.num_bytes(tail, like=self.in_proj) if tail else 0
        return batch_size * (size * values + 8 + tail_bytes)

    @torch.no_grad()
    def _stream(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        token_scale: Tensor,
        state: TTTMixerState,
    ) -> Tensor:
        """The output [B, H, T, f] for T more frames; rows may differ in position."""
        dtype = state.layers[0][0].dtype
        norm = self.inner_norm_weight.to(dtype), self.inner_norm_bias.to(dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        slots = torch.arange(self.args.mini_batch_size, device=q.device)
        num_frames = q.shape[2]
        outputs = []
        start = 0
        while start < num_frames:
            # As many frames as no row's mini-batch ends before. A single frame always fits, and
            # then nothing is asked of the device: a CUDA graph can hold it.
            length = num_frames - start
            if length > 1:
                length = min(length, self.args.mini_batch_size - int(state.num_pending.max()))
            piece = slice(start, start + length)
            query, key, value, rate = (x[:, :, piece] for x in (q, k, v, eta))
            here = state.num_pending[:, None] + torch.arange(length, device=q.device)
            self._append(inner_errors(state.layers, key, value, rate, *norm), here, state)
            scale = token_scale[here][:, None, :, None] * (slots <= here[:, None, :, None])
            z = inner_read(state.layers, state.written, query, scale)
            outputs.append(query + layer_norm(z, *norm))
            state.num_pending += length * state.exec_mask
            self._write_complete_mini_batches(token_scale[-1], state)
            start += length
        return torch.cat(outputs, dim=2)

    def _append(self, new: Written, positions: Tensor, state: TTTMixerState) -> None:
        """Keep what L frames write. A paused row's land where its next ones will."""
        for buffers, values in zip(state.written, new, strict=True):
            for buffer, value in zip(buffers, values, strict=True):
                buffer.scatter_(2, positions[:, None, :, None].expand_as(value), value)

    def _write_complete_mini_batches(self, scale: Tensor, state: TTTMixerState) -> None:
        complete = state.num_pending == self.args.mini_batch_size
        # Within a CUDA graph nothing can be asked of the device: then every frame pays for the
        # update, which is zero in the rows that are not at the end of their mini-batch.
        capturing = complete.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing and not bool(complete.any()):
            return
        updated = inner_write(state.layers, state.written, (scale * complete).view(-1, 1, 1, 1))
        for fast, new in zip(flatten(state.layers), flatten(updated), strict=True):
            fast.copy_(new)
        state.num_pending.masked_fill_(complete, 0)
