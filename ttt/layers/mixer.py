"""A layer of its own, between attention and MLP, whose heads learn at test time."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from moshi.modules.transformer import create_norm_fn
from torch import Tensor, nn

from ttt import ops
from ttt.config import TTTArgs
from ttt.layers.base import Cost, Place, TTTLayer
from ttt.layers.blocks import norm_of, normalize
from ttt.layers.conv_tail import ConvTail
from ttt.layers.mixer_measure import measure
from ttt.layers.mixer_state import TTTMixerState
from ttt.ops.autocast import without_autocast
from ttt.ops.inner_loop.pieces import (
    BLOCK,
    InnerLayers,
    Written,
    flatten,
    inner_errors,
    inner_read,
    inner_write,
    layer_norm,
)
from ttt.ops.inner_loop.ttt_linear_mlp import KERNEL_WIDTHS, has_kernel, inner_scan, kernel_sizes

INIT_STD = 0.02
GROUP_SIZE = 16
"""`scan_checkpoint_group_size`, where a layer's or all layers' share would be much at once."""


class TTTMixer(TTTLayer[TTTMixerState]):
    """`tanh(α) ⊙ out_proj · TTT(norm(x))`, to be added to x: `TTTLinear` or `TTTMLP`.

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
        place: the layer that gets it; a head is f = d / H wide.
        args: the TTT configuration; its `num_heads` replaces attention's as H.

    Raises:
        ValueError: heads that do not divide d, or an odd f with RoPE.
    """

    hidden_factors: ClassVar[tuple[int, ...]]
    """Widths of the hidden layers of what a head holds, as multiples of f."""
    inner_std: ClassVar[float] = INIT_STD
    """Of the inner weights' start, behind convolutions."""
    default_base_lr: ClassVar[float] = 1.0
    default_base_lr_without_conv: ClassVar[float] = 1.0

    def __init__(self, place: Place, args: TTTArgs):
        super().__init__(place, args)
        width, num_heads = place.width, args.num_heads or place.num_heads
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
            return nn.Parameter(torch.empty(*shape, device=place.device, dtype=place.dtype))

        # In the type of the model's weights, as all norms of a loaded model are.
        norm = create_norm_fn(place.norm, width, device=place.device, dtype=place.dtype)
        self.norm = norm.to(place.dtype)
        kernel = args.qk_conv_kernel_size
        self.in_proj = new((2 if kernel > 1 else 3) * width, width)
        if kernel > 1:
            self.conv_q, self.conv_k = new(width, kernel), new(width, kernel)
        self.out_proj = new(width, width)
        self.gate = new(width)
        inner_widths = [f, *(factor * f for factor in self.hidden_factors), f]
        self.num_inner_layers = len(inner_widths) - 1
        for index, (inputs, outputs) in enumerate(pairwise(inner_widths), 1):
            self.register_parameter(f"inner_w{index}", new(num_heads, inputs, outputs))
            self.register_parameter(f"inner_b{index}", new(num_heads, outputs))
        self.inner_norm_weight, self.inner_norm_bias = new(num_heads, f), new(num_heads, f)
        self.lr_weight, self.lr_bias = new(num_heads, width), new(num_heads)
        self.token_offset = new(size)
        self.reset_parameters()

    @property
    def inner_layers(self) -> InnerLayers:
        """The learned start of the fast weights."""
        return tuple(
            (getattr(self, f"inner_w{index}"), getattr(self, f"inner_b{index}"))
            for index in range(1, 1 + self.num_inner_layers)
        )

    @property
    def base_lr(self) -> float:
        """`base_lr` of the configuration, or its default."""
        if self.args.base_lr is not None:
            return self.args.base_lr
        with_conv = self.args.qk_conv_kernel_size > 1
        return self.default_base_lr if with_conv else self.default_base_lr_without_conv

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start of training: see the class; the rest as in the paper."""
        has_conv = self.args.qk_conv_kernel_size > 1
        inner_std = self.inner_std if has_conv else INIT_STD
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

    def forward(
        self, x: Tensor, token_embeddings: Tensor | None, is_frame: Tensor | None
    ) -> Tensor:
        """Return what is added to x; see `TTTLayer.forward`. No embeddings are read, and frames
        past the end of a recording are frames as others."""
        state = self._streaming_state
        if state is not None:
            mixed = self._stream(*self._prepare(x), state)
            return self.streamed(self._finish(mixed, x), x)
        q, k, v, eta, token_scale = self.execution.piece(TTTMixer._prepare, self, x)
        inner = self.inner_layers, self.inner_norm_weight, self.inner_norm_bias
        mixed, _ = inner_scan(
            q,
            k,
            v,
            eta,
            *inner,
            token_scale=token_scale,
            scan_checkpoint_group_size=self._scan_checkpoint_group_size(q),
        )
        update = self.execution.piece(TTTMixer._finish, self, mixed, x)
        self.measure_once(
            lambda: measure(k, v, eta, *inner, x, update, is_frame, token_scale=token_scale)
        )
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
            q = ops.rope(q, positions, theta=self.args.rope_theta)
            k = ops.rope(k, positions, theta=self.args.rope_theta)
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
            before = state.tail.pass_by(shared, state.learns)
        q, k = (ops.short_conv(shared, w, before=before) for w in (self.conv_q, self.conv_k))
        return q, k, v

    def _scan_checkpoint_group_size(self, q: Tensor) -> int | None:
        """Return the size as the operators take it: None keeps everything. What the kernels keep,
        one layer can keep whole; without them it would be all weights of all mini-batches too."""
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
        """Return the learning rates of each frame [B, H, T] and each position [K], at least in
        float32."""
        dtype = torch.promote_types(normed.dtype, torch.float32)
        gate = F.linear(normed, self.lr_weight, self.lr_bias).to(dtype).transpose(1, 2)
        eta = self.base_lr * torch.sigmoid(gate) / self.head_width
        size = self.args.mini_batch_size
        shares = 1 / torch.arange(1, size + 1, device=normed.device, dtype=dtype)
        return eta, (shares + self.token_offset.to(dtype)).clamp(min=0)

    # What is asked of it ---------------------------------------------------------------------

    def remarks(self) -> Iterator[str]:
        if self.args.use_rope:
            yield (
                "TTT turns queries and keys by their position modulo "
                f"{self.args.mini_batch_size} (RoPE, theta {self.args.rope_theta:g})"
            )

    def cautions(self) -> Iterator[str]:
        sizes, size = kernel_sizes(self.num_inner_layers), self.args.mini_batch_size
        if size not in sizes or self.head_width not in KERNEL_WIDTHS:
            yield (
                f"ttt.mini_batch_size is {size}, of heads of {self.head_width}: the GPU kernels of "
                f"ttt.method {self.args.method} take {_either(sizes)} frames of "
                f"heads of {_either(KERNEL_WIDTHS)}. Without them it computes the same, several "
                "times slower."
            )

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

    @torch.no_grad()
    @without_autocast
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
        num_frames, learns = q.shape[2], state.learns
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
            state.num_pending += length * learns
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


KEPT_BYTES_PER_FRAME = 110e3
"""Of a layer that is not made again: measured with TTT-MLP. TTT-Linear, whose fast weights are
smaller, keeps less."""
NOT_SPARED = 0.032
"""Share of a step without TTT that five layers without it spare if they are not made again, and
these do not: their scan is made again all the same, by groups. Measured with TTT-MLP."""
_MEASURED_FRAMES = 1250
"""Of the segments whose training steps were measured."""


class TTTLinear(TTTMixer):
    """`TTTMixer` whose heads hold a linear map; `ttt.ops.ttt_linear`."""

    hidden_factors = ()

    @classmethod
    def cost(cls, args: TTTArgs) -> Cost:
        # By count: weights at the end of a segment and, going back, those at its start, each with
        # its gradient; and what a mini-batch has for itself.
        segment = 7e6
        # 8e3 of the bytes are reckoned and not measured: what the convolutions read.
        frame = 167e3 - segment / _MEASURED_FRAMES
        return Cost(1.09, frame, segment, 1.09 + NOT_SPARED, KEPT_BYTES_PER_FRAME)


class TTTMLP(TTTMixer):
    """`TTTMixer` whose heads hold a small MLP; `ttt.ops.ttt_mlp`."""

    hidden_factors = (4,)
    # With 0.02 the hidden units hardly bend, and all of them write the same.
    inner_std = 0.1
    default_base_lr = 10.0
    default_base_lr_without_conv = 0.1

    def __init__(self, place: Place, args: TTTArgs):
        super().__init__(place, args)
        self.may_keep = args.keep_writes

    @classmethod
    def cost(cls, args: TTTArgs) -> Cost:
        # Without what is kept reckoned, from times and memory of the operator and a step with it.
        kept = 1.31 + NOT_SPARED, KEPT_BYTES_PER_FRAME
        # By count, of heads 128 wide: the weights after it; and going back, these and their
        # gradients, and what a block has for itself.
        after = (2 * 4 * 128 + 5) * 4 * 4096
        segment = 93.5e6
        if not args.keeps_writes:
            segment += after
            return Cost(1.31, 158e3 - segment / _MEASURED_FRAMES, segment, *kept)
        # S1, Z2, ZQ2 and the output.
        again = (4 * 4 + 2 * 4 + 2) * 4096, after, BLOCK
        return Cost(1.26, 52e3 - segment / _MEASURED_FRAMES, segment, *kept, *again)


def _either(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
