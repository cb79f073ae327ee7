"""Moshi with TTT: where the layers go, and how the embeddings reach them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn

from ttt.config import TTTArgs
from ttt.layers import TTTLayer, blocks
from ttt.layers.depth import depth_hidden
from ttt.layers.execution import Execution, eager_on_cpu
from ttt.layers.shardable import Shardable
from ttt.ops.rope import RopeTable, rope_table


class TTTTransformerLayer(Shardable, StreamingTransformerLayer):
    """A stock layer with a place for TTT: between attention and MLP, `ttt`; or within the MLP, a
    gating that learns at test time, which it hands the token embeddings on to.

    Streams as the stock layer does; whole sequences go through `ttt.layers.blocks`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ttt: TTTLayer | None = None
        self.execution = Execution()

    @property
    def ttt_module(self) -> TTTLayer | None:
        """Return what learns at test time in this layer."""
        return self.gating if isinstance(self.gating, TTTLayer) else self.ttt

    def forward(
        self,
        x: Tensor,
        cross_attention_src: Tensor | None = None,
        token_embeddings: Tensor | None = None,
        rope: RopeTable | None = None,
        is_frame: Tensor | None = None,
    ) -> Tensor:
        assert cross_attention_src is None
        if self._streaming_state is not None:
            # Never checkpointed: to compute a step again would advance the stream again.
            x = self._stock_forward(x, token_embeddings, is_frame)
            self._streaming_state.offset_cpu += x.shape[1]
            return x
        if not blocks.is_covered(self.self_attn):
            return self.execution.stock(self._stock_forward, x, token_embeddings, is_frame)
        weights = blocks.layer_of(self)
        if self.ttt_module is None or (self.ttt is not None and not self.ttt.active):
            return self.execution.layer(blocks.layer_block, x, weights, rope)
        x = self.execution.split_layer(
            self._ttt_forward,
            x,
            weights,
            token_embeddings,
            rope,
            is_frame,
            # A scale's gradient is made of what it scales.
            may_keep=self.ttt_module.may_keep and weights.scale2 is None,
        )
        if isinstance(self.gating, TTTLayer):
            return x
        return self.execution.layer(blocks.mlp_block, x, weights)

    def _ttt_forward(
        self,
        x: Tensor,
        weights: blocks.Layer,
        token_embeddings: Tensor,
        rope: RopeTable | None,
        is_frame: Tensor | None,
    ) -> Tensor:
        """The layer as far as what learns at test time is in it."""
        x = self.execution.piece(blocks.attention_block, x, weights, rope)
        if self.ttt is not None:
            return x + self.ttt(x, token_embeddings, is_frame)
        assert isinstance(self.gating, TTTLayer)
        normed = self.execution.piece(blocks.normalize, x, weights.norm2)
        return blocks.add(x, self.gating(normed, token_embeddings, is_frame), weights.scale2)

    def _stock_forward(
        self, x: Tensor, token_embeddings: Tensor | None, is_frame: Tensor | None
    ) -> Tensor:
        with eager_on_cpu(x.device):
            x = self._sa_block(x)
            if self.ttt is not None and self.ttt.active:
                x = x + self.ttt(x, token_embeddings, is_frame)
            if not isinstance(self.gating, TTTLayer):
                return self._ff_block(x)
            assert token_embeddings is not None
            update = self.gating(self.norm2(x), token_embeddings, is_frame)
            return x.to(update) + self.layer_scale_2(update)


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states that the output heads read, at the frames where the delayed codes are to be
    predicted: a stream with a delay of d frames has the target of frame t at t + d."""

    text: Tensor
    """[B, T, d]."""
    audio: Tensor
    """[K, B · T, C], for K codebooks."""


class TTTLMModel(Shardable, LMModel):
    """A stock `LMModel`, trainable and streamable as such, with TTT in some layers.

    State-dict keys are the stock ones, plus `transformer.layers.N.ttt.*`, or where a method's layer
    takes the place of the MLP, what it adds to `transformer.layers.N.gating.*`.
    """

    ttt_args: TTTArgs
    execution: Execution
    """How whole sequences are computed in training; all but `selective_layers` share it."""

    @property
    def ttt_layers(self) -> dict[int, TTTLayer]:
        """The TTT modules by layer index."""
        return {
            index: layer.ttt_module
            for index, layer in enumerate(self.transformer.layers)
            if layer.ttt_module is not None
        }

    @property
    def order_of_keeping(self) -> list[int]:
        """Return the main transformer's layers in the order in which `selective_layers` takes them:
        those with TTT at last, as what they keep takes more memory for the time that it spares; and
        of equal ones the last before the others, as they keep it for the shortest time."""
        last_first = reversed(range(len(self.transformer.layers)))
        return sorted(last_first, key=lambda index: index in self.ttt_layers)

    def _init_weights(self) -> None:
        # On `meta` there is nothing to draw, and drawing it takes seconds for a large model.
        if not self.text_emb.weight.is_meta:
            super()._init_weights()

    def forward(
        self, codes: Tensor, condition_tensors: None = None, *, with_heads: bool = True
    ) -> LMOutput | HiddenStates:
        """Compute logits as stock does, for codes [B, 17, T]; or, without the heads, what they
        read: the logits of a large vocabulary take more memory than all else, and a loss can do
        without having them all."""
        assert condition_tensors is None
        if with_heads:
            return super().forward(codes)
        initial = self._get_initial_token().expand(len(codes), -1, -1)
        delayed = torch.cat([initial, _delay_sequence(self.delays, codes, initial)], dim=2)
        text = self._text_hidden(delayed[:, :, :-1])
        return HiddenStates(text, depth_hidden(self, delayed[:, :, 1:], text, self.execution))

    def forward_text(
        self,
        sequence: Tensor,
        sum_condition: Tensor | None = None,
        cross_attention_src: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute as stock does, but give the layers also the embeddings that TTT makes its targets
        of.

        Args:
            sequence: [B, 17, T], the (delayed) codes that the model reads.

        Returns:
            The transformer's output [B, T, d] and the text logits [B, 1, T, text_card].
        """
        assert sum_condition is None and cross_attention_src is None
        out = self._text_hidden(sequence)
        return out, self.text_linear(out)[:, None]

    def _text_hidden(self, sequence: Tensor) -> Tensor:
        with eager_on_cpu(sequence.device):
            text = self.text_emb(sequence[:, 0])
            # The order of summation is the stock one, for equality to the bit.
            everything = None
            for emb, codes in zip(
                self.emb, sequence[:, self.audio_offset :].unbind(1), strict=True
            ):
                everything = emb(codes) if everything is None else everything + emb(codes)
            everything = text if everything is None else everything + text
            embeddings = everything if self.ttt_args.target == "input" else text
            out = self.transformer(
                everything,
                token_embeddings=embeddings,
                rope=self._rope_table(sequence),
                is_frame=(sequence != self.zero_token_id).any(1),
            )
            return self.out_norm(out)

    def _rope_table(self, sequence: Tensor) -> RopeTable | None:
        """Return the RoPE table of sequences from their start; streams know their own positions."""
        rope = self.transformer.rope
        if rope is None or self._streaming_state is not None:
            return None
        head_width = self.dim // self.transformer.layers[0].self_attn.num_heads
        frames = torch.arange(sequence.shape[2], device=sequence.device)
        # Against [B, T, H, D].
        return rope_table(frames[:, None], head_width, rope.max_period, interleave=rope.interleave)

    def forward_depformer_training(self, sequence: Tensor, transformer_out: Tensor) -> Tensor:
        """Return audio logits [B, K, T, card], as stock does."""
        batch, num_frames = transformer_out.shape[:2]
        with eager_on_cpu(sequence.device):
            hidden = depth_hidden(self, sequence, transformer_out, self.execution)
        logits = [linear(x) for linear, x in zip(self.linears, hidden, strict=True)]
        return torch.stack(logits).unflatten(1, (batch, num_frames)).transpose(0, 1)


def ttt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """TTT's own parameters by their state-dict keys."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, TTTLayer)
        for key, parameter in module.ttt_parameters().items()
    }


def state_bytes(model: TTTLMModel, batch_size: int) -> int:
    """Bytes that the streaming state of TTT takes for `batch_size` streams."""
    return sum(module.state_bytes(batch_size) for module in model.ttt_layers.values())


@contextmanager
def measuring(model: TTTLMModel, *, enabled: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collects what TTT does in the forward passes within the block, if `enabled`.

    The dictionary that it gives is filled when the block ends: `layer_05/effect` and so on, scalar
    tensors of the first forward pass in which a frame could read what was learned; of none, where
    there is no such frame. Every method has `effect`, ‖what TTT adds‖ / ‖what it is added to‖; what
    else there is, `ttt.layers.in_place_measure` and `ttt.layers.mixer_measure` say. A block within
    a block measures for itself alone.
    """
    collected: dict[str, Tensor] = {}
    with _layers_set(model, measure=enabled, measured={}):
        try:
            yield collected
        finally:
            for index, module in model.ttt_layers.items():
                collected.update({f"layer_{index:02d}/{k}": v for k, v in module.measured.items()})


@contextmanager
def without_ttt(model: TTTLMModel) -> Iterator[None]:
    """Within the block the model computes what it would without its TTT layers, and their state
    stands still.

    A CUDA graph keeps what held when it was captured: enter this before `.streaming()`.
    """
    with _layers_set(model, active=False):
        yield


@contextmanager
def _layers_set(model: TTTLMModel, **values: Any) -> Iterator[None]:
    """Within the block these attributes of all TTT layers have these values; then those that they
    had before, which need not be the usual ones."""
    before = [
        (module, {name: getattr(module, name) for name in values})
        for module in model.ttt_layers.values()
    ]
    try:
        for module, _ in before:
            vars(module).update(values)
        yield
    finally:
        for module, own in before:
            vars(module).update(own)
