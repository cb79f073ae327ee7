"""Milliseconds per frame of calls, whole: Mimi in, model, Mimi out; and whether an hour is like its
first five minutes.

    python benchmarks/calls.py [--callers 1 4 8 16 32] [--ttt on off] [--limit-sec 230] [--out X]
    python benchmarks/calls.py --checkpoint RUN/checkpoints/checkpoint_N --callers 1 --frames 45000

Moshi 7B and Mimi with random weights, or a checkpoint. With random weights all callers say the same
noise at the same time, which is the most that a step can have to do; and Moshi says in all rows
what it says in the first, so that all rows must learn the same. No time is reported unless they do,
and unless every step was healthy in every row. The callers of a checkpoint say what the users of
the demonstration's dialogues do, over and over.

On a machine without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from moshi.models import loaders
from streaming import make_model

from finetune.data import AudioReader, Codec, inspect_audio
from finetune.evaluation.tasks.health.measure import (
    MEASURES,
    alarms,
    frame_levels_db,
    measure,
    silent_below_db,
)
from finetune.inference import load_for_inference
from finetune.kept import write_whole
from finetune.serve import open_engine
from finetune.serve.engine import Engine, Samples, Spoken
from ttt import TTTArgs, TTTLMModel

FRAME_MS = 80.0
SAME_ACROSS_ROWS = 0.02
"""Of what TTT has learned: rows of one batch are rounded alike, up to the tails of kernels."""
WARM_UP_FRAMES = 8
"""Frames that are not timed: kernels are compiled, and graphs captured."""
FEWEST_TIMED = 40
DEMO = Path(__file__).parents[1] / "example/demo"


class Wrong(Exception):
    """A wrong result: what was computed is not what it should be, so that its time says nothing."""


def random_parts(args: argparse.Namespace, use: str) -> tuple[TTTLMModel, Codec]:
    """Moshi 7B and Mimi, or on a CPU small ones; nothing is read but the demonstration's files."""
    device = torch.device(args.device)
    is_large = device.type == "cuda"
    ttt_args = TTTArgs()
    if use == "on":
        every = max(1, (32 if is_large else 8) // args.ttt_layers)
        where = {"start_layer": every - 1, "layer_frequency": every}
        ttt_args = TTTArgs(enabled=True, chunk_size=args.chunk_size, target="text", **where)
    model = make_model(ttt_args, device)
    config = None
    if not is_large:
        config = json.loads((DEMO / "model/mimi_config.json").read_text())
        config["quantizer"]["bins"] = model.card
    mimi = loaders.get_mimi(None, config, num_codebooks=8, device=device)
    for name, values in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            # New codebooks are zero, and every frame would have the same codes.
            values.normal_()
    tokenizer = sentencepiece.SentencePieceProcessor(str(DEMO / "model/tokenizer.model"))
    return model, Codec(mimi, tokenizer, moshi_codebooks=8, user_codebooks=8, device=device)


def voices(args: argparse.Namespace, codec: Codec) -> Iterator[Samples]:
    """Yield what callers say, a frame at a time and without end."""
    size = int(codec.mimi.frame_size)
    if not args.checkpoint:
        rng = np.random.default_rng(0)
        return cycle(0.1 * rng.standard_normal((100, size)).astype(np.float32))
    frames: list[Samples] = []
    for path in sorted((DEMO / "dialogues").glob("*.wav")):
        num_frames = int(inspect_audio(path).duration_sec * codec.mimi.frame_rate)
        audio = AudioReader(path).read(0, num_frames * size, codec.sample_rate_hz)
        frames.extend(audio[1].reshape(num_frames, size).numpy())
    return cycle(frames)


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


def run(
    model: TTTLMModel, codec: Codec, callers: int, use: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one line of the table.

    Raises:
        Wrong: what was computed is not healthy, or not the same in all rows.
    """
    free_memory(reset_peak=True)
    # Before the engine has the codec to itself.
    silent_db = silent_below_db(codec)
    voice = voices(args, codec)
    heard = Heard()
    parts: list[dict[str, Any]] = []
    step_ms, done = np.zeros(args.frames), 0
    torch.manual_seed(0)
    with open_engine(model, codec, max_users=callers) as engine:
        follow_first_row(engine, heard, same=not args.checkpoint)
        rows = [row for _ in range(callers) if (row := engine.join(ttt_on=use == "on")) is not None]
        while done < args.frames and left_sec(args) > 0:
            frame = next(voice)
            started_at = time.perf_counter()
            # What is spoken is on the host: the device has done all of it.
            spoken = engine.step({row.index: frame for row in rows})
            step_ms[done] = 1e3 * (time.perf_counter() - started_at)
            if not all(each.healthy for each in spoken.values()):
                raise Wrong(f"frame {done}: not all is finite")
            heard.add(spoken[0])
            done += 1
            if done % args.part_frames == 0:
                last = step_ms[done - args.part_frames : done]
                parts.append(part_of(last, heard.health(codec, silent_db), engine))
                compare(parts[-1], parts[0])
                report({"callers": callers, "ttt": use, "frames": done} | parts[-1])
        changes = engine.changes()
        state_gb = callers * engine.row_bytes() / 1e9
    timed = step_ms[WARM_UP_FRAMES:done]
    if len(timed) < min(FEWEST_TIMED, args.frames - WARM_UP_FRAMES):
        return {"skipped": f"time was up after {done} frames"}
    if use == "on":
        check_changes(model, changes, done, args)
    return times(timed) | {
        "frames": done,
        "first_step_sec": round(step_ms[0] / 1e3, 1),
        "over_80_ms": round(float((timed > FRAME_MS).mean()), 4),
        "state_gb": round(state_gb, 6),
        **memory_gb(),
        "changes": {layer: round(by_row[0], 4) for layer, by_row in changes.items()},
        "parts": parts,
    }


def follow_first_row(engine: Engine, heard: Heard, *, same: bool) -> None:
    """Note the first row's codes; with `same`, let all rows say what it says."""
    generator = engine.generator

    def spread(tokens: torch.Tensor) -> None:
        if same:
            tokens.copy_(tokens[:1].expand_as(tokens).clone())

    def audio(tokens: torch.Tensor) -> None:
        spread(tokens)
        # A CUDA graph writes its next tokens to the same place.
        heard.first_codes.append(tokens[0, 0].clone())

    generator.on_text_hook, generator.on_audio_hook = spread, audio


def check_changes(
    model: TTTLMModel, changes: dict[int, list[float]], num_frames: int, args: argparse.Namespace
) -> None:
    for layer, by_row in changes.items():
        if not args.checkpoint and max(by_row) - min(by_row) > SAME_ACROSS_ROWS * max(by_row):
            raise Wrong(f"layer {layer} has learned otherwise in other rows: {by_row}")
        if num_frames > model.ttt_args.update_frames and not max(by_row) > 0:
            raise Wrong(f"layer {layer} has learned nothing")


def times(step_ms: np.ndarray) -> dict[str, float]:
    return {
        "median_ms": round(float(np.median(step_ms)), 2),
        "p99_ms": round(float(np.percentile(step_ms, 99)), 2),
        "max_ms": round(float(step_ms.max()), 2),
    }


def part_of(step_ms: np.ndarray, health: dict[str, float], engine: Engine) -> dict[str, Any]:
    """A part of a long call: time, memory, and the health of what is said."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        **times(step_ms),
        "host_mb": round(pages * 4096 / 1e6, 1),
        **memory_gb(),
        "changes": {layer: round(rows[0], 4) for layer, rows in engine.changes().items()},
        "health": health,
    }


def compare(part: dict[str, Any], first: dict[str, Any]) -> None:
    """Say in a part of a call how it differs from the first."""
    part["against_first"] = {
        "median": round(part["median_ms"] / first["median_ms"], 3),
        "host_mb": round(part["host_mb"] - first["host_mb"], 1),
        "alarms": [alarm.text for alarm in alarms(part["health"], first["health"])],
    }


def memory_gb() -> dict[str, float]:
    """The most that PyTorch has had of the GPU: in tensors, and with what it keeps for later."""
    if not torch.cuda.is_initialized():
        return {}
    return {
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def free_memory(*, reset_peak: bool = False) -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether memory was what lacked; libraries, and what was being captured as a graph, say
    it with errors of their own."""
    while error is not None:
        signs = "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED"
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def left_sec(args: argparse.Namespace) -> float:
    return float(args.ends_at - time.perf_counter())


def report(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def measure_all(use: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of the table, with TTT or without."""
    began_at = time.perf_counter()
    if args.checkpoint:
        model, codec = load_for_inference(args.checkpoint, args.device)
    else:
        model, codec = random_parts(args, use)
    built_sec = round(time.perf_counter() - began_at, 1)
    report({"ttt": use, "layers": list(model.ttt_layers), "built_sec": built_sec} | memory_gb())
    for callers in args.callers:
        line = {"callers": callers, "ttt": use}
        if left_sec(args) < 0:
            yield line | {"skipped": "time was up"}
            continue
        try:
            line |= run(model, codec, callers, use, args)
        except Wrong as wrong:
            line |= {"wrong": str(wrong)}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            line |= {"out_of_memory": str(error).splitlines()[0]} | memory_gb()
        yield line


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--part-frames", type=int, default=3750, help="a line each so many")
    parser.add_argument("--ttt", nargs="+", choices=["on", "off"], help="on, and off without C")
    parser.add_argument("--ttt-layers", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--limit-sec", type=float, default=float("inf"), help="after the imports")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.ends_at = time.perf_counter() + args.limit_sec
    if args.device == "cpu" and not args.checkpoint:
        args.chunk_size = min(args.chunk_size, 8)
    machine = {"machine": args.device, "torch": torch.__version__}
    if args.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(args.device)
        machine |= {"machine": properties.name, "gb": round(properties.total_memory / 1e9, 1)}
    report(machine)
    found: list[dict[str, Any]] = []
    for use in args.ttt or (["on"] if args.checkpoint else ["on", "off"]):
        for line in measure_all(use, args):
            found.append(line)
            report({name: value for name, value in line.items() if name != "parts"})
            if args.out:
                write_whole(args.out, json.dumps(machine | {"lines": found}, indent=1))
        free_memory()
    if wrong := [
        f"{line['callers']} callers: {line['wrong']}" for line in found if "wrong" in line
    ]:
        sys.exit(f"wrong: {'; '.join(wrong)}")
    return found


if __name__ == "__main__":
    main()
