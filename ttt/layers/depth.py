"""The depth transformer over whole sequences: all steps of all frames at once."""

from collections.abc import Sequence
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer
from torch import Tensor, nn

from ttt.layers import blocks
from ttt.layers.execution import Execution, eager_on_cpu
from ttt.layers.shardable import Shardable

CHUNK_FRAMES = 10_000
"""Frames at once, at most. They are independent of each other, and a layer's intermediate results,
which for 20,000 frames of Moshi are 10 GB in the backward pass, would be the peak of memory."""


class DepthLayer(Shardable, StreamingTransformerLayer):
    """A stock layer of the depth transformer, which also takes whole sequences."""

    def whole_sequence(
        self, chunks: Sequence[Tensor], schedule: Sequence[int], execution: Execution
    ) -> list[Tensor]:
        """Compute all steps of all frames, in chunks [K, n, C]. In one call, so that the weights of
        a sharded layer are gathered once: for as many chunks as each process has.

        Args:
            schedule: which weights each of the K steps takes, if they differ by step.
        """
        numbers = schedule if self.weights_per_step else [0]
        weights = tuple(blocks.layer_of(self, number) for number in numbers)
        return [execution.layer(blocks.depth_layer_block, x, weights) for x in chunks]


def depth_hidden(
    model: LMModel, sequence: Tensor, transformer_out: Tensor, execution: Execution
) -> Tensor:
    """Return what the heads of the audio codebooks read.

    Args:
        sequence: [B, 17, T], the delayed codes from the first frame on, as the model writes them.
        transformer_out: [B, T, d].

    Returns:
        [K, B · T, C], for K = `model.dep_q` codebooks.
    """
    codes, x = sequence.transpose(0, 1).flatten(1), transformer_out.flatten(0, 1)
    num_chunks = -(-len(x) // CHUNK_FRAMES)
    length = -(-len(x) // num_chunks)
    chunks = zip(codes.split(length, dim=1), x.split(length), strict=True)
    schedule = model.depformer_weights_per_step_schedule or list(range(model.dep_q))
    inputs = [_input_of(model, *chunk, schedule, execution) for chunk in chunks]
    if _is_covered(model.depformer):
        for module in model.depformer.layers:
            inputs = module.whole_sequence(inputs, schedule, execution)
        hidden = _joined(inputs)
    else:
        hidden = execution.stock(_stock_depth, model.depformer, _joined(inputs))
    if all(isinstance(norm, nn.Identity) for norm in model.depformer_norms):
        return hidden
    return torch.cat([norm(hidden[k : k + 1]) for k, norm in enumerate(model.depformer_norms)])


def _stock_depth(depformer: StreamingTransformer, x: Tensor) -> Tensor:
    """[K, N, C] of [K, N, C]. In here what is stock stays eager when it is computed again, too."""
    with eager_on_cpu(x.device):
        return depformer(x.transpose(0, 1)).transpose(0, 1)


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)


def _input_of(
    model: LMModel, codes: Tensor, x: Tensor, schedule: Sequence[int], execution: Execution
) -> Tensor:
    """[K, N, C] of codes [17, N] and the main transformer's output [N, d]."""
    steps = range(model.dep_q)
    tokens = [model.depformer_text_emb(codes[0])]
    # The last codebook is never read.
    tokens += [
        emb(codes[model.audio_offset + k])
        for k, emb in zip(steps, model.depformer_emb, strict=False)
    ]
    linears = [blocks.linear_of(linear) for linear in model.depformer_in]
    if model.depformer_multi_linear:
        linears = [linears[number] for number in schedule]
    return execution.layer(blocks.depth_input_block, x, torch.stack(tokens), tuple(linears))


def _is_covered(depformer: StreamingTransformer) -> bool:
    """Return whether `blocks` knows this kind of depth transformer, as all of Moshi's are."""
    return depformer.positional_embedding == "none" and all(
        blocks.is_covered(layer.self_attn) and _is_even(layer.gating) for layer in depformer.layers
    )


def _is_even(gating: Any) -> bool:
    """Return whether the MLPs of all steps have one shape."""
    if not isinstance(gating, nn.ModuleList):
        return True
    if not all(isinstance(step, ActivationGating) for step in gating):
        return False
    inward: list[Any] = [step.linear_in for step in gating]
    return len({blocks.linear_of(linear).weight.shape for linear in inward}) == 1
