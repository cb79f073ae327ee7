"""Small Moshis for the experiment, and what they answer."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from moshi.models.lm_utils import _delay_sequence
from torch import Tensor, nn

from ttt import TTTArgs, TTTLMModel, build_model

OTHERS_SHARE = 0.125
"""Of `embedding_std`, for the streams that hold no facts. With embeddings of one size for all,
the eight codebooks drown the ninth stream, and a small model first needs long to tell its tokens
apart."""


@dataclass(frozen=True)
class ModelArgs:
    """A small model of Moshi's structure."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    context: int = 16
    """Frames that attention sees in each layer, its own included."""
    depformer_width: int = 32
    embedding_std: float = 1.0
    """Of the embeddings at the start."""

    @property
    def reach_frames(self) -> int:
        """Return how many frames back the stacked windows carry anything."""
        return self.num_layers * (self.context - 1)


class Streams(Protocol):
    """Streams as a model must know them, to read them."""

    @property
    def text_card(self) -> int:
        """Tokens of the text."""

    @property
    def card(self) -> int:
        """Codes of every codebook."""

    @property
    def num_codebooks(self) -> int:
        """Moshi's and the user's together."""

    @property
    def fact_streams(self) -> set[int]:
        """The streams with keys or values."""


def lm_kwargs(args: ModelArgs, streams: Streams) -> dict[str, Any]:
    """Return what `ttt.build_model` takes: Moshi's structure, with half of the codebooks Moshi's
    own and half the user's, and the acoustic ones delayed."""
    half = streams.num_codebooks // 2
    delays = [0, *[0, *[1] * (half - 1)] * 2]
    return {
        "dim": args.width,
        "num_heads": args.num_heads,
        "num_layers": args.num_layers,
        "context": args.context,
        "text_card": streams.text_card,
        "card": streams.card,
        "n_q": 2 * half,
        "dep_q": half,
        "delays": delays,
        "hidden_scale": 4.125,
        "causal": True,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "existing_text_padding_id": 3,
        "depformer_dim": args.depformer_width,
        "depformer_dim_feedforward": 4 * args.depformer_width,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_multi_linear": True,
        "depformer_context": half,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
    }


def new_model(
    args: ModelArgs,
    streams: Streams,
    ttt: TTTArgs,
    *,
    context: int | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool = False,
) -> TTTLMModel:
    """Return a new model; the same seed gives the same weights, whatever TTT adds to them."""
    kwargs = lm_kwargs(args, streams)
    torch.manual_seed(seed)
    plain = build_model(kwargs, TTTArgs(), device=device, dtype=dtype)
    for stream, embedding in enumerate((plain.text_emb, *plain.emb)):
        share = 1.0 if stream in streams.fact_streams else OTHERS_SHARE
        nn.init.normal_(embedding.weight, std=args.embedding_std * share)
    model = build_model(
        kwargs, ttt, device=device, dtype=dtype, attention_context=context, compile=compile
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def read_codes(model: TTTLMModel, codes: Tensor) -> Tensor:
    """[B, K, T + 1], what the model reads of codes [B, K, T], as `LMModel.forward` has it: position
    s holds frame s - 1, acoustic codebooks one frame earlier."""
    initial = model._get_initial_token().expand(len(codes), -1, -1)
    return torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)


def answer_logits(model: TTTLMModel, read: Tensor, frames: Tensor, asked_stream: int) -> Tensor:
    """[B, Q, card], of the codes at `frames` [B, Q] in the asked stream, in one pass.

    The Depformer, which has no memory of its own, runs at these frames alone.
    """
    hidden, text = model.forward_text(read[:, :, :-1])
    return logits_at(model, hidden, text, read[:, :, 1:], frames, asked_stream)


def logits_at(
    model: TTTLMModel,
    hidden: Tensor,
    text_logits: Tensor,
    spoken: Tensor,
    frames: Tensor,
    asked_stream: int,
) -> Tensor:
    """Return logits as `answer_logits` does, from what `forward_text` gave for some frames.

    Args:
        spoken: [B, K, T], the codes that the model says, delayed.
    """

    def at(x: Tensor) -> Tensor:
        return x.gather(1, frames[:, :, None].expand(-1, -1, x.shape[2]))

    if asked_stream == 0:
        return at(text_logits[:, 0])
    said = at(spoken.transpose(1, 2)).transpose(1, 2)
    return model.forward_depformer_training(said, at(hidden))[:, 0]
