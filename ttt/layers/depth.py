"""The depth transformer over whole sequences: all steps of all frames at once."""

from collections.abc import Sequence

import torch
from moshi.models.lm import LMModel
from moshi.modules.gating import ActivationGating
from moshi.modules.transformer import StreamingTransformerLayer
from torch import Tensor, nn

from ttt.layers import blocks
from ttt.layers.execution import Execution
from ttt.layers.shardable import Shardable


class DepthLayer(Shardable, StreamingTransformerLayer):
    """A stock layer of the depth transformer, which also takes whole sequences."""

    def whole_sequence(self, x: Tensor, schedule: Sequence[int], execution: Execution) -> Tensor:
        """All steps of all frames, [K, N, C]. A method, so that a sharded layer's weights are
        gathered for it.

        Args:
            schedule: which weights each of the K steps takes, if they differ by step.
        """
        numbers = schedule if self.weights_per_step else [0]
        weights = tuple(blocks.layer_of(self, number) for number in numbers)
        return execution.layer(blocks.depth_layer_block, x, weights)

CHUNK_FRAMES = 10_000
"""Frames at once, at most. They are independent of each other, and a layer's intermediate results,
which for 20,000 frames of Moshi are 10 GB in the backward pass, would be the peak of memory."""


def depth_hidden(
    model: LMModel, sequence: Tensor, transformer_out: Tensor, execution: Execution
) -> Tensor:
    """What the heads of the audio codebooks read.

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
    hidden = [_hidden_of(model, *chunk, execution) for chunk in chunks]
    return hidden[0] if num_chunks == 1 else torch.cat(hidden, dim=1)


def _hidden_of(model: LMModel, codes: Tensor, x: Tensor, execution: Execution) -> Tensor:
    """[K, N, C] of codes [17, N] and the main transformer's output [N, d]."""
    steps = range(model.dep_q)
    tokens = [model.depformer_text_emb(codes[0])]
    # The last codebook is never read.
    tokens += [emb(codes[model.audio_offset + k]) for k, emb in zip(steps, model.depformer_emb)]
    schedule = model.depformer_weights_per_step_schedule or list(steps)
    linears = [blocks.linear_of(linear) for linear in model.depformer_in]
    if model.depformer_multi_linear:
        linears = [linears[number] for number in schedule]
    x = execution.layer(blocks.depth_input_block, x, torch.stack(tokens), tuple(linears))
    if _is_covered(model.depformer):
        for module in model.depformer.layers:
            x = module.whole_sequence(x, schedule, execution)
    else:
        x = model.depformer(x.transpose(0, 1)).transpose(0, 1)
    if all(isinstance(norm, nn.Identity) for norm in model.depformer_norms):
        return x
    return torch.cat([norm(x[k : k + 1]) for k, norm in zip(steps, model.depformer_norms)])


def _is_covered(depformer: nn.Module) -> bool:
    """Whether `blocks` knows this kind of depth transformer, as all of Moshi's are."""
    return depformer.positional_embedding == "none" and all(
        blocks.is_covered(layer.self_attn) and _is_even(layer.gating) for layer in depformer.layers
    )


def _is_even(gating: nn.Module | None) -> bool:
    """Whether the MLPs of all steps have one shape."""
    if not isinstance(gating, nn.ModuleList):
        return True
    known = all(isinstance(step, ActivationGating) for step in gating)
    return known and len({blocks.linear_of(step.linear_in).weight.shape for step in gating}) == 1
