"""The loss: cross-entropy of text and audio, each `Σ w · CE / Σ w` over the whole global batch.

The sums and their weights are kept apart until they are complete, over micro-batches and processes,
so that nothing is averaged twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor

from finetune.step.chunked_loss import chunked_cross_entropy
from ttt import HiddenStates
from ttt.layers.blocks import linear_of


@dataclass(frozen=True)
class LossWeights:
    """Weights of targets: 1, unless a target is text padding or of the first audio codebook."""

    text_padding: float
    first_codebook: float


@dataclass
class StreamSums:
    """Sums over the targets of one kind of stream, text or audio; 0-dimensional tensors.

    loss: Σ w · CE in nats, with gradient. weight: Σ w.
    nll: Σ CE in nats, without weights. count: number of targets.
    """

    loss: Tensor
    weight: Tensor
    nll: Tensor
    count: Tensor


def stream_sums(
    model: LMModel, output: LMOutput | HiddenStates, codes: Tensor, weights: LossWeights
) -> tuple[StreamSums, StreamSums]:
    """Text and audio sums of a batch.

    Args:
        output: what `model` gave for `codes`; without heads it takes far less memory.
        codes: [B, 17, T].
    """
    if isinstance(output, HiddenStates):
        return _sums_of_hidden(model, output, codes, weights)
    text, audio = target_weights(model, codes, weights)
    text_codes, audio_codes = _targets(model, codes)
    return (
        _sums(output.text_logits, text_codes, output.text_mask, text),
        _sums(output.logits, audio_codes, output.mask, audio),
    )


def total_weight(model: LMModel, batches: Sequence[Tensor], weights: LossWeights) -> Tensor:
    """Σ w of all targets in `batches` of codes, [2]: text, audio; known before any forward pass."""
    sums = [
        torch.stack([kind.sum() for kind in target_weights(model, codes, weights)])
        for codes in batches
    ]
    return torch.stack(sums).sum(0)


def target_weights(model: LMModel, codes: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """w of every text and audio target: [B, 1, T] and [B, 8, T], float32.

    It is 0 where the model's own masks are false: at zero tokens, and at the end of a delayed
    stream, where the model has read nothing yet.
    """
    text_codes, _ = _targets(model, codes)
    text_mask, audio_mask = _masks(model, codes)
    is_padding = (text_codes == model.text_padding_token_id) | (
        text_codes == model.end_of_text_padding_id
    )
    text = torch.where(is_padding, weights.text_padding, 1.0)
    per_codebook = torch.ones(model.dep_q, device=codes.device)
    per_codebook[:1] = weights.first_codebook
    return text * text_mask, per_codebook[:, None] * audio_mask


def _masks(model: LMModel, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the model's own masks are true."""
    num_frames = codes.shape[2]
    frames = torch.arange(num_frames, device=codes.device)
    # Delay by delay: a tensor of them would be copied to the GPU, which a CUDA graph cannot hold.
    is_read = torch.stack([frames < num_frames - d for d in model.delays[: 1 + model.dep_q]])
    text, audio = (targets != model.zero_token_id for targets in _targets(model, codes))
    return text & is_read[:1], audio & is_read[1:]


def _targets(model: LMModel, codes: Tensor) -> tuple[Tensor, Tensor]:
    offset = model.audio_offset
    return codes[:, :offset], codes[:, offset : offset + model.dep_q]


def _sums(logits: Tensor, targets: Tensor, mask: Tensor, weight: Tensor) -> StreamSums:
    # Masked logits are NaN: they must be gone before the loss, or their gradient is NaN too.
    logits = torch.where(mask[..., None], logits, 0.0).float()
    targets = torch.where(mask, targets, 0)
    nll = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(mask)
    nll = nll * mask
    return StreamSums((nll * weight).sum(), weight.sum(), nll.detach().sum(), mask.sum())


def _sums_of_hidden(
    model: LMModel, hidden: HiddenStates, codes: Tensor, weights: LossWeights
) -> tuple[StreamSums, StreamSums]:
    heads = [model.text_linear, *model.linears]
    states = [hidden.text.flatten(0, 1), *hidden.audio]
    by_kind = zip(
        _targets(model, codes), _masks(model, codes), target_weights(model, codes, weights),
        strict=True,
    )  # fmt: skip
    streams = [
        (targets[:, k], mask[:, k], weight[:, k])
        for targets, mask, weight in by_kind
        for k in range(targets.shape[1])
    ]
    found = []
    for head, state, stream, delay in zip(heads, states, streams, model.delays, strict=False):
        # A masked target is the last of its row, or no class: its place is at the start, or empty.
        targets, mask, weight = (x.roll(delay, dims=1).flatten() for x in stream)
        loss, nll = chunked_cross_entropy(
            state, linear_of(head), targets.clamp(min=0), weight, compile=model.execution.compile
        )
        found.append((loss, weight.sum(), (nll * mask).sum(), mask.sum()))
    text, *audio = found
    return StreamSums(*text), StreamSums(*(torch.stack(x).sum(0) for x in zip(*audio, strict=True)))
