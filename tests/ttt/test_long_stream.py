"""Streams of an hour: nothing may overflow, and with `delta` nothing may grow without end."""

import pytest
import torch
from helpers import (
    moshi_like,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_model,
    tiny_relative_args,
)
from long_stream import CALL_FRAMES, speech_and_silence, stream

from ttt import TTTArgs

LM = {k: moshi_like()[k] for k in ("norm", "positional_embedding")}


@pytest.mark.parametrize("num_frames", [1000, pytest.param(50_000, marks=pytest.mark.slow)])
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
def test_a_long_stream_stays_sane(args: TTTArgs, num_frames: int) -> None:
    codes = speech_and_silence(num_frames)
    model = tiny_model(args, context=CALL_FRAMES, **LM)
    exact = stream(model, codes)[2]
    logits, sizes, states = stream(model.to(torch.float32), codes)
    assert logits.isfinite().all() and sizes.isfinite().all()
    if args.write == "delta":
        # Most is learned early; what follows must not add up.
        assert sizes.max() < 5 * sizes[: len(sizes) // 5].max()
        assert logits.abs().max() < 3 * logits[: num_frames // 5].abs().max()
    for low, high in zip(states, exact, strict=True):
        assert (low - high).norm() / high.norm() < 1e-3
