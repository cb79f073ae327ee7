"""Callers of `calls.py`: what they say, when they begin, and what is seen of their rows."""

import argparse
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data import AudioReader, Codec, inspect_audio
from finetune.evaluation.tasks.health.measure import MEASURES, frame_levels_db, measure
from finetune.serve import Engine, Row, Spoken
from finetune.serve.engine import Samples
from ttt import TTTLMModel

DEMO = Path(__file__).parents[1] / "example/demo"


def voices(args: argparse.Namespace, codec: Codec) -> Sequence[Samples]:
    """Return what callers say, frame by frame, over and over."""
    size = int(codec.mimi.frame_size)
    if not args.checkpoint:
        rng = np.random.default_rng(0)
        return [*(0.1 * rng.standard_normal((100, size)).astype(np.float32))]
    frames: list[Samples] = []
    for path in sorted((DEMO / "dialogues").glob("*.wav")):
        num_frames = int(inspect_audio(path).duration_sec * codec.mimi.frame_rate)
        audio = AudioReader(path).read(0, num_frames * size, codec.sample_rate_hz)
        frames.extend(audio[1].reshape(num_frames, size).numpy())
    return frames


@dataclass
class Heard:
    """This keeps what the first row has said since the last part of the call."""

    texts: list[int] = field(default_factory=list)
    first_codes: list[torch.Tensor] = field(default_factory=list)
    """[], on the device, of Moshi's first codebook."""
    levels_db: list[float] = field(default_factory=list)

    def add(self, spoken: Spoken) -> None:
        self.texts.append(spoken.text_token)
        sound = torch.from_numpy(spoken.audio)[None]
        self.levels_db.append(float(frame_levels_db(sound, sound.shape[1])[0, 0]))

    def health(self, codec: Codec, silent_db: float) -> dict[str, float]:
        """Measure all of it, and keep none: a long call must not grow by its own measurement."""
        codes = torch.stack(self.first_codes[-len(self.texts) :]).cpu()
        said = torch.stack([torch.tensor(self.texts), codes])
        found = measure(codec, said, torch.tensor(self.levels_db), silent_db)
        for values in (self.texts, self.first_codes, self.levels_db):
            values.clear()
        return {name: round(found[name], 3) for name in MEASURES}


def join_all(engine: Engine, line: dict[str, Any]) -> list[Row]:
    """Let all callers come at the same moment; `begin_frame` says when each begins."""
    now_frame = 0 if line["begin"] == "apart" else None
    found = [
        engine.join(ttt_on=line["ttt"] == "on", now_frame=now_frame) for _ in range(line["callers"])
    ]
    return [row for row in found if row is not None]


def follow_first_row(engine: Engine, heard: Heard, rows: list[Row], *, same: bool) -> None:
    """Note the first row's codes; with `same`, let all rows say what it says, each as long after it
    as it has begun after it."""
    generator = engine.generator
    longest_wait_frames = max(row.begin_frame for row in rows)
    behind_frames = [longest_wait_frames - row.begin_frame for row in rows]
    places = torch.tensor(behind_frames, device=engine.model.device)
    recent: dict[str, deque[torch.Tensor]] = {}

    def spread(kind: str, tokens: torch.Tensor) -> None:
        if same:
            now = tokens[:1].clone()
            # The first step is the same for all.
            said = recent.setdefault(
                kind, deque([now] * longest_wait_frames, longest_wait_frames + 1)
            )
            said.append(now)
            tokens.copy_(torch.cat([*said])[places])

    def audio(tokens: torch.Tensor) -> None:
        spread("audio", tokens)
        # A CUDA graph writes its next tokens to the same place.
        heard.first_codes.append(tokens[0, 0].clone())

    generator.on_text_hook, generator.on_audio_hook = partial(spread, "text"), audio


class Ends:
    """How many rows have ended a chunk in each frame, as the device has it."""

    def __init__(self, model: TTTLMModel) -> None:
        self.layer = next(iter(model.ttt_layers.values()), None)
        self.by_frame: list[int] = []

    def look(self, frames: Mapping[int, Samples]) -> None:
        open_frames = None if self.layer is None else self.layer.open_frames()
        if open_frames is not None:
            rows = open_frames.tolist()
            self.by_frame.append(sum(rows[index] == 0 for index in frames))

    def times(self, step_ms: np.ndarray, counts: slice) -> dict[int, dict[str, float]]:
        """Return times of the frames in `counts`, by the number of rows that end a chunk."""
        ends = np.array(self.by_frame[counts])
        found = {}
        for number in sorted(set(ends.tolist())):
            those = step_ms[counts][ends == number]
            found[number] = {"frames": len(those), **times(those)}
        return found


def times(step_ms: np.ndarray) -> dict[str, float]:
    return {
        "median_ms": round(float(np.median(step_ms)), 2),
        "p99_ms": round(float(np.percentile(step_ms, 99)), 2),
        "max_ms": round(float(step_ms.max()), 2),
    }
