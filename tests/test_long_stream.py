"""Streams of an hour: nothing may overflow, and with `delta` nothing may grow without end."""

import pytest
import torch
from helpers import moshi_like, random_codes, tiny_args, tiny_delta_args, tiny_model

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
    """Text logits [T, card], ‖S‖ / ‖W0‖ of the layers after every call, and the final states."""
    model = tiny_model(args, context=CALL_FRAMES, **LM).to(dtype)
    modules = model.ttt_layers.values()
    logits, sizes = [], []
    with torch.no_grad(), model.streaming(1):
        for part in codes.split(CALL_FRAMES, dim=2):
            logits.append(model.forward_text(part)[1][0, 0])
            sizes.append([m._streaming_state.change.norm() / m.base_weight.norm() for m in modules])
        states = [m._streaming_state.change.double() for m in modules]
    return torch.cat(logits), torch.tensor(sizes), states


@pytest.mark.parametrize("num_frames", [2000, pytest.param(50_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "args",
    [
        tiny_args(chunk_size=20, learning_rate=1e-3),
        tiny_args(chunk_size=20, learning_rate=1e-3, state_decay=0.99, max_delta_norm=1.0),
        tiny_delta_args(chunk_size=20),
        tiny_delta_args(chunk_size=20, state_decay=0.99),
    ],
    ids=["sum", "sum, bounded, decay", "delta", "delta, decay"],
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
