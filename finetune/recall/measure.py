"""A model's memory is measured: answers right and losses, by distance, with intervals."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.recall.model import answer_logits, logits_at, read_codes
from finetune.recall.streams import KINDS, StreamArgs, Streams, draw
from finetune.statistics import Bootstrap, of_shares
from ttt import TTTLMModel, block_streaming

NUM_DISTANCE_BINS = 4
PIECE_FRAMES = 128
"""Of long streams, read at once."""
EVAL_SEED = 2_000_000_000
"""Seeds of evaluation streams start here, those of training streams end below."""


@dataclass(frozen=True)
class Answers:
    """Answers of a model: all [B, Q], on the CPU."""

    is_right: Tensor
    loss: Tensor
    """In nats."""
    distances: Tensor
    straddling: Tensor

    def summary(self, chosen: Tensor) -> dict[str, Any]:
        """Return what `summarize` says of the chosen answers, [B, Q] or [B, 1]."""
        return summarize(self.is_right, chosen, self.loss)


def answer(logits: Tensor, streams: Streams, asked_stream: int, update_frames: int) -> Answers:
    """Judge logits [B, Q, card]."""
    expected = streams.codes[:, asked_stream].gather(1, streams.answers)
    logits = logits.float().cpu()
    loss = F.cross_entropy(logits.transpose(1, 2), expected, reduction="none")
    return Answers(
        logits.argmax(-1) == expected, loss, streams.distances, streams.straddling(update_frames)
    )


@torch.no_grad()
def measure_trained_length(
    model: TTTLMModel, args: StreamArgs, *, num_sequences: int, batch: int, update_frames: int
) -> dict[str, Any]:
    """Accuracy and loss on sequences as long as in training: see `summarize`."""
    parts = []
    for index in range(0, num_sequences, batch):
        streams = draw(args, batch=min(batch, num_sequences - index), seed=EVAL_SEED + index)
        read = read_codes(model, streams.codes.to(model.device))
        logits = answer_logits(model, read, streams.answers.to(model.device), args.asked_stream)
        parts.append(answer(logits, streams, args.asked_stream, update_frames))
    found = Answers(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("is_right", "loss", "distances", "straddling")
        )
    )
    edges = np.linspace(args.min_distance_frames, args.num_frames, NUM_DISTANCE_BINS + 1)
    bins = {
        f"{a:.0f} to {b:.0f}": (found.distances >= a) & (found.distances < b)
        for a, b in pairwise(edges)
    }
    return {
        "all": found.summary(torch.ones_like(found.is_right)),
        "in one chunk": found.summary(~found.straddling),
        "straddling": found.summary(found.straddling),
        "by_distance": {name: found.summary(chosen) for name, chosen in bins.items()},
    }


@torch.no_grad()
def measure_length(
    model: TTTLMModel, args: StreamArgs, *, times: int, num_sequences: int, update_frames: int
) -> dict[str, Any]:
    """Measure sequences `times` as long, by kind, read in pieces as a stream; and how large the
    fast weights have become."""
    total = times * args.num_frames
    # A segment has no keys to bind again.
    names = [kind for kind in KINDS if args.variant != "segments" or kind != "rebound"]
    kinds = [
        draw(args, batch=num_sequences, seed=EVAL_SEED + times, kind=kind, num_frames=total)
        for kind in names
    ]
    streams = Streams(
        torch.cat([k.codes for k in kinds]),
        torch.cat([k.answers for k in kinds]),
        torch.cat([k.facts for k in kinds]),
        kinds[0].fact_frames,
    )
    read = read_codes(model, streams.codes.to(model.device))
    # All questions are in the last frames.
    start = total - args.num_frames
    kept = []
    with block_streaming(model, len(read), PIECE_FRAMES):
        for piece in range(0, total, PIECE_FRAMES):
            hidden, text = model.forward_text(read[:, :, piece : min(piece + PIECE_FRAMES, total)])
            if piece + PIECE_FRAMES > start:
                kept.append((hidden, text))
        ratios = _state_ratios(model)
    hidden = torch.cat([h for h, _ in kept], dim=1)[:, -args.num_frames :]
    text = torch.cat([t for _, t in kept], dim=2)[:, :, -args.num_frames :]
    frames = streams.answers.to(model.device) - start
    logits = logits_at(model, hidden, text, read[:, :, 1 + start :], frames, args.asked_stream)
    found = answer(logits, streams, args.asked_stream, update_frames)
    results: dict[str, Any] = {}
    for index, name in enumerate(names):
        rows = torch.zeros(len(found.is_right), 1, dtype=torch.bool)
        rows[index * num_sequences : (index + 1) * num_sequences] = True
        results[name] = {
            **found.summary(rows & ~found.straddling),
            "state_ratio": ratios[rows[:, 0]].mean().item() if ratios is not None else None,
        }
    return results


def _state_ratios(model: TTTLMModel) -> Tensor | None:
    """Return ‖S‖ / ‖W0‖ of every row [B], in the layer where it is largest; None without TTT that
    changes weights."""
    layers = [layer for layer in model.ttt_layers.values() if layer.is_change]
    known = [layer.stream_change().cpu() for layer in layers]
    return torch.stack(known).amax(0) if known else None


def summarize(values: Tensor, chosen: Tensor, loss: Tensor | None = None) -> dict[str, Any]:
    """Return the share of the chosen answers [B, Q] whose value is true, and their mean loss, each
    with its 95 % interval over sequences: [value, low, high], None where there is no answer, and
    low and high None where too few sequences have one (see `finetune.statistics`)."""
    chosen = chosen.expand_as(values)
    counts = chosen.sum(1).double().numpy()
    if counts.sum() == 0:
        return {"count": 0, "accuracy": None, "loss": None}
    bootstrap = Bootstrap(len(counts))
    summary: dict[str, Any] = {"count": int(counts.sum())}
    right = bootstrap.ratio((values.double() * chosen).sum(1).numpy(), counts)
    found = {"accuracy": of_shares(right)}
    if loss is not None:
        lost = bootstrap.ratio((loss.double() * chosen).sum(1).numpy(), counts)
        found["loss"] = dataclasses.replace(
            lost, low=None if lost.low is None else max(0.0, lost.low)
        )
    for name, estimate in found.items():
        summary[name] = [estimate.value, estimate.low, estimate.high]
    return summary


@contextmanager
def nothing_written(model: TTTLMModel) -> Iterator[None]:
    """Within the block no TTT layer that has `write_gates` writes anything."""
    gates = [gate for module in model.ttt_layers.values() for gate in module.write_gates()]
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, values in zip(gates, kept, strict=True):
                gate.copy_(values)
