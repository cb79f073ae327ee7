"""Moshi with TTT: where the layers go, and how the embeddings reach them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel, LMOutput
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ttt.config import TTTArgs
from ttt.layers import Place, TTTLayer, blocks, layer_class
from ttt.layers.depth import DepthLayer, depth_hidden
from ttt.layers.execution import Checkpointing, Execution, eager_on_cpu
from ttt.layers.shardable import Shardable
from ttt.ops.rope import RopeTable, rope_table
from ttt.registry import METHODS

logger = logging.getLogger(__name__)


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
            self._ttt_forward, x, weights, token_embeddings, rope, is_frame
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


def build_model(
    lm_kwargs: Mapping[str, Any],
    ttt_args: TTTArgs,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: Checkpointing = False,
    selective_layers: int = 0,
    compile: bool = False,
    attention_context: int | None = None,
) -> TTTLMModel:
    """A Moshi with random weights and TTT in the configured layers, in training mode.

    Untrained TTT changes nothing: the outputs are those of the stock model with the same weights.

    Args:
        lm_kwargs: what stock `LMModel` takes; for Moshi 7B, `moshi.models.loaders._lm_kwargs`.
        ttt_args: with `enabled: false` the model has no TTT layers.
        device: `meta` to load weights later.
        dtype: of the parameters.
        gradient_checkpointing: what to keep for the backward pass; see `Checkpointing`.
        selective_layers: how many of the main transformer's layers keep what `selective` does where
            the others keep their inputs alone; those with TTT at last.
        compile: the layers in training. It changes nothing but time and rounding.
        attention_context: frames that attention sees, instead of the `context` in `lm_kwargs`; in
            the TTT layers `ttt_args.attention_context` replaces both.

    Raises:
        ValueError: an option out of range, no layer to put TTT in, a layer without a gated MLP,
            more `selective_layers` than there are, or an odd head width with RoPE.
    """
    lm_kwargs = dict(lm_kwargs)
    if attention_context is not None:
        if attention_context < 1:
            raise ValueError(f"attention_context: must be at least 1, got {attention_context}")
        lm_kwargs["context"] = attention_context
    problems = ttt_args.problems()
    if problems:
        raise ValueError("; ".join(f"ttt.{name}: {problem}" for name, problem in problems))
    indices = ttt_args.layers(lm_kwargs["num_layers"])
    method = METHODS[ttt_args.method]
    if indices and method.replaces_mlp and lm_kwargs.get("gating", "none") == "none":
        raise ValueError(
            f"ttt.method: {ttt_args.method} needs gated MLPs, and this model has none "
            "(gating: none)."
        )
    if lm_kwargs.get("cross_attention") or lm_kwargs.get("fuser") is not None:
        raise ValueError(
            "models with conditioning (cross attention or a fuser, as Hibiki has) are not "
            "supported; use a Moshi without it."
        )
    if not 0 <= selective_layers <= lm_kwargs["num_layers"]:
        raise ValueError(
            f"selective_layers: must lie between 0 and the model's {lm_kwargs['num_layers']} "
            f"layers, got {selective_layers}"
        )
    without_values = device is not None and torch.device(device).type == "meta"
    with _NothingDrawn() if without_values else nullcontext():
        model = TTTLMModel(
            device=device,
            dtype=dtype,
            layer_class=TTTTransformerLayer,
            depformer_layer_class=DepthLayer,
            **lm_kwargs,
        )
    model.ttt_args = ttt_args
    model.execution = Execution(gradient_checkpointing, compile)
    norm = lm_kwargs.get("norm", "layer_norm")
    for index in indices:
        block = model.transformer.layers[index]
        place = Place(block, model.dim, block.self_attn.num_heads, norm, device, dtype)
        layer = layer_class(ttt_args.method)(place, ttt_args)
        if method.replaces_mlp:
            block.gating = layer
        else:
            block.ttt = layer
    assert list(model.ttt_layers) == indices
    selective = Execution("selective", compile)
    chosen = set(model.order_of_keeping[:selective_layers])
    for index, block in enumerate(model.transformer.layers):
        block.execution = selective if index in chosen else model.execution
        if block.ttt_module is not None:
            block.ttt_module.execution = block.execution
    _set_attention_context(model, ttt_args)
    # Every layer says the same.
    for remark in dict.fromkeys(r for m in model.ttt_layers.values() for r in m.remarks()):
        logger.info(remark)
    return model


class _NothingDrawn(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with random numbers.

    Tensors on `meta` have no values, and PyTorch takes 2 ms to draw those of one: most of the time
    that a Moshi 7B takes to build there, and with its imports nearly all that a small one takes.
    """

    DRAW = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAW:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _set_attention_context(model: TTTLMModel, args: TTTArgs) -> None:
    """Set the attention's context in the TTT layers, or those that would be: a control run with
    `enabled: false` must see as much as the run that it is compared with. The KV cache of streaming
    follows, as it asks the attention."""
    if args.attention_context is None:
        return
    layers = model.transformer.layers
    chosen = layers[args.start_layer :: args.layer_frequency]
    for layer in chosen:
        layer.self_attn.context = args.attention_context
    assert len(chosen) == len(model.ttt_layers) or not args.enabled
    logger.info(
        "attention sees %d frames in the %d layers of ttt.start_layer and ttt.layer_frequency, "
        "and %s in the %d others",
        args.attention_context,
        len(chosen),
        model.context,
        len(layers) - len(chosen),
    )


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
    else there is, `ttt.layers.in_place_measure` and `ttt.layers.mixer_measure` say.
    """
    collected: dict[str, Tensor] = {}
    for module in model.ttt_layers.values():
        module.measure, module.measured = enabled, {}
    try:
        yield collected
    finally:
        for index, module in model.ttt_layers.items():
            module.measure = False
            collected.update({f"layer_{index:02d}/{k}": v for k, v in module.measured.items()})


@contextmanager
def without_ttt(model: TTTLMModel) -> Iterator[None]:
    """Within the block the model computes what it would without its TTT layers, and their state
    stands still.

    A CUDA graph keeps what held when it was captured: enter this before `.streaming()`.
    """
    for module in model.ttt_layers.values():
        module.active = False
    try:
        yield
    finally:
        for module in model.ttt_layers.values():
            module.active = True
