"""What `plan` says that TTT-Linear and TTT-MLP take, against what their operators allocate: on a
device without memory, where no kernel runs."""

import dataclasses
import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_plan import MOSHI
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.model import plan_model
from finetune.plan.memory import _stages
from finetune.plan.plan import shape_of
from ttt import TTTArgs
from ttt.ops import recompute
from ttt.ops.inner_loop import mlp_blocks, scan_triton

HEADS, WIDTH, SIZE = 32, 128, 16
"""Of Moshi 7B, in mini-batches of the default size."""


class Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it and alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._alive:
                    freed = partial(self._free, storage._cdata, storage.nbytes())
                    self._alive[storage._cdata] = weakref.ref(storage, freed)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return out

    def _free(self, key: int, num_bytes: int, _: Any) -> None:
        del self._alive[key]
        self.now -= num_bytes


def operator_of(
    method: str, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], torch.Tensor]:
    """A layer's operator, on one segment."""
    monkeypatch.setattr(mlp_blocks._Launch, "__call__", lambda *_: None)
    monkeypatch.setattr(scan_triton, "_launch", lambda *_, **__: None)
    on_meta: dict[str, Any] = {"device": "meta", "requires_grad": True}
    shape = 1, HEADS, math.ceil(num_frames / SIZE), SIZE
    q, k, v = (torch.empty(*shape, WIDTH, dtype=torch.bfloat16, **on_meta) for _ in range(3))
    eta, norm, scale = (torch.empty(*each, **on_meta) for each in (shape, (HEADS, WIDTH), (SIZE,)))
    hidden = {"linear": (), "mlp": (4 * WIDTH,)}[method]
    layers = tuple(
        (torch.empty(1, HEADS, *each, **on_meta), torch.empty(1, HEADS, each[1], **on_meta))
        for each in pairwise((WIDTH, *hidden, WIDTH))
    )
    options: dict[str, Any] = {"num_writes": num_frames // SIZE, "group_size": None}
    scan = partial(scan_triton.scan, q, k, v, eta, layers, norm, norm, token_scale=scale, **options)
    return lambda: scan()[0]


def kept_bytes(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a layer of TTT-MLP keeps of a segment."""
    operator = operator_of("mlp", num_frames, monkeypatch)
    first, _ = recompute.forward_passes(may_keep=True)
    with first:
        operator()
    assert isinstance(first, recompute._Pass) and first.shelf is not None
    (kept,) = first.shelf
    return sum(each.nbytes for each in kept)


def stages_of(num_frames: int, **options: Any) -> tuple[list[tuple[float, float, float]], int, int]:
    """What `plan` says of 20,000 frames, and how many layers learn and segments there are."""
    batch_size = 20_000 // num_frames
    batch: dict[str, Any] = {"duration_sec": num_frames / 12.5, "batch_size": batch_size}
    args = dataclasses.replace(MOSHI, ttt=TTTArgs(enabled=True, **options), **batch)
    model = plan_model(args, shape_of(args.moshi_paths)[0])
    stages = _stages(args, model, batch_size * num_frames, width=2)
    return stages, len(model.ttt_layers), batch_size


@pytest.mark.parametrize("num_frames", [8, 65, 125, 1250])
def test_no_less_is_said_than_is_kept(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short segments less was said: of blocks of 64 frames their own alone, and no weights."""
    kept = []
    for keeps in (True, False):
        stages, num_layers, batch_size = stages_of(num_frames, method="mlp", keep_writes=keeps)
        kept.append(stages[1][0])
    said = (kept[0] - kept[1]) / num_layers / batch_size
    assert 1.0 <= said / kept_bytes(num_frames, monkeypatch) < 1.02


@pytest.mark.parametrize(("method", "keeps"), [("linear", False), ("mlp", False), ("mlp", True)])
def test_short_segments_take_what_each_takes_however_short_it_is(
    method: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layer at work, a block of 64 frames has memory of its own, and the weights theirs: of
    160 segments of 10 s 13 GB too little were said."""
    said, most = [], []
    for num_frames in (125, 1250):
        options = {"keep_writes": keeps} if method == "mlp" else {}
        stages, _, batch_size = stages_of(num_frames, method=method, **options)
        said.append(stages[2][2])
        operator = operator_of(method, num_frames, monkeypatch)
        with Allocated() as allocated:
            out = operator()
            # What is kept is counted with what all layers keep.
            before = allocated.now if keeps else 0
            out.backward(torch.empty_like(out))
        most.append((allocated.most - before) * batch_size)
    assert said[0] - said[1] == pytest.approx(most[0] - most[1], rel=0.05)
