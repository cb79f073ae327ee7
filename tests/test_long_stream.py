"""Streams of an hour: nothing may overflow, and with `delta` nothing may grow without end."""

import pytest
import torch
from helpers import (
    moshi_like,
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_model,
    tiny_relative_args,
)

from ttt.layers import InPlaceGating

CALL_FRAMES = 50
LM = {k: moshi_like()[k] for k in ("norm", "positional_embedding")}


def speech_and_silence(num_frames):
    """[1, 9, T]: speech with pauses (text padding, one code), then digital silence, then one
    segment over and over, a fifth of the stream each, and speech again."""
    speech = random_codes(batch=1, num_frames=num_frames, seed=3)
    pauses = torch.arange(num_frames) // 7 % 3 == 0
    speech[:, 0, pauses] = 3
    speech[:, 1:, pauses] = 1
    fifth = num_frames // 5
    speech[:, 0, fifth : 2 * fifth] = 3
    speech[:, 1:, fifth : 2 * fifth] = 1
    speech[:, :, 2 * fifth : 3 * fifth] = speech[:, :, :25].repeat(1, 1, fifth)[:, :, :fifth]
    return speech


def stream(args, dtype, codes):
    """Text logits [T, card], sizes of the layers' fast weights after every call (with `in_place`
    ‖S‖ / ‖W0‖, else relative to their start), and the final fast weights."""
    model = tiny_model(args, context=CALL_FRAMES, **LM).to(dtype)
    modules = model.ttt_layers.values()
    logits, sizes = [], []
    with torch.no_grad(), model.streaming(1):
        for part in codes.split(CALL_FRAMES, dim=2):
            logits.append(model.forward_text(part)[1][0, 0])
            sizes.append([fast_weights(m).norm() / size_at_start(m) for m in modules])
        states = [fast_weights(m).double() for m in modules]
    return torch.cat(logits), torch.tensor(sizes), states


def fast_weights(module):
    state = module._streaming_state
    if isinstance(module, InPlaceGating):
        return state.change
    return torch.cat([x.flatten() for pair in state.layers for x in pair])


def size_at_start(module):
    if isinstance(module, InPlaceGating):
        return module.base_weight.norm()
    return torch.cat([x.flatten() for pair in module.inner_layers for x in pair]).norm()


@pytest.mark.parametrize("num_frames", [2000, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "args",
    [
        tiny_args(chunk_size=20, learning_rate=1e-3),
        tiny_args(chunk_size=20, learning_rate=1e-3, state_decay=0.99, max_delta_norm=1.0),
        tiny_delta_args(chunk_size=20),
        tiny_relative_args(chunk_size=20),
        tiny_relative_args(chunk_size=20, write="delta"),
        tiny_delta_args(chunk_size=20, state_decay=0.99),
        tiny_linear_args(base_lr=1.0),
        tiny_linear_args(method="mlp", base_lr=0.1, use_rope=True),
    ],
    ids=[
        "sum",
        "sum, bounded, decay",
        "delta",
        "relative",
        "relative delta",
        "delta, decay",
        "linear",
        "mlp",
    ],
)
def test_a_long_stream_stays_sane(args, num_frames):
    codes = speech_and_silence(num_frames)
    logits, sizes, states = stream(args, torch.float32, codes)
    assert logits.isfinite().all() and sizes.isfinite().all()
    if args.write == "delta":
        # Most is learnt early; what follows must not add up.
        assert sizes.max() < 5 * sizes[: len(sizes) // 5].max()
        assert logits.abs().max() < 3 * logits[: num_frames // 5].abs().max()
    for low, high in zip(states, stream(args, torch.float64, codes)[2], strict=True):
        assert (low - high).norm() / high.norm() < 1e-3
