"""What `plan` says that TTT-MLP keeps of its writes, against what its operator keeps."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from test_plan import MOSHI

from finetune.model import plan_model
from finetune.plan.memory import _stages
from finetune.plan.plan import shape_of
from ttt import TTTArgs
from ttt.ops import recompute
from ttt.ops.inner_loop import mlp_blocks, scan_triton

HEADS, WIDTH, SIZE = 32, 128, 16
"""Of Moshi 7B, in mini-batches of the default size."""


def kept_bytes(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a layer keeps of a segment, on a device without memory, where no kernel runs."""
    monkeypatch.setattr(mlp_blocks._Launch, "__call__", lambda *_: None)
    on_meta: dict[str, Any] = {"device": "meta", "requires_grad": True}
    shape = 1, HEADS, math.ceil(num_frames / SIZE), SIZE
    q, k, v = (torch.empty(*shape, WIDTH, dtype=torch.bfloat16, **on_meta) for _ in range(3))
    eta, norm, scale = (torch.empty(*each, **on_meta) for each in (shape, (HEADS, WIDTH), (SIZE,)))
    sizes = (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
    layers = tuple(
        (torch.empty(1, HEADS, *each, **on_meta), torch.empty(1, HEADS, each[1], **on_meta))
        for each in sizes
    )
    first, _ = recompute.forward_passes(may_keep=True)
    with first:
        scan_triton.scan(
            q, k, v, eta, layers, norm, norm, token_scale=scale,
            num_writes=num_frames // SIZE, group_size=None,
        )  # fmt: skip
    assert isinstance(first, recompute._Pass) and first.shelf is not None
    (kept,) = first.shelf
    return sum(each.nbytes for each in kept)


@pytest.mark.parametrize("num_frames", [8, 65, 125, 1250])
def test_no_less_is_said_than_is_kept(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short segments less was said: of blocks of 64 frames their own alone, and no weights."""
    kept = []
    for keeps in (True, False):
        ttt = TTTArgs(enabled=True, method="mlp", keep_writes=keeps)
        batch: dict[str, Any] = {
            "duration_sec": num_frames / 12.5,
            "batch_size": 20_000 // num_frames,
        }
        args = dataclasses.replace(MOSHI, ttt=ttt, **batch)
        model = plan_model(args, shape_of(args.moshi_paths)[0])
        kept.append(_stages(args, model, args.batch_size * num_frames, width=2)[1][0])
    said = (kept[0] - kept[1]) / len(model.ttt_layers) / args.batch_size
    assert 1.0 <= said / kept_bytes(num_frames, monkeypatch) < 1.02
