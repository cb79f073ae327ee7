"""Milliseconds per frame of calls, whole: Mimi in, model, Mimi out; and whether an hour is like its
first five minutes.

    python benchmarks/calls.py [--callers 1 4 8 16 32] [--frames 400] [--ttt-layers 5]
    python benchmarks/calls.py --checkpoint RUN/checkpoints/checkpoint_N --callers 1 --frames 45000

Moshi 7B and Mimi with random weights, or a checkpoint; all callers say the same noise and say it at
the same time, which is the most that a step can have to do. No time is reported unless every step
was healthy in every row, and unless what TTT has learned is the same in all rows.

On a machine without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from moshi.models import loaders
from streaming import make_model

from finetune.data import Codec
from finetune.evaluation.tasks.health.measure import frame_levels_db, measure
from finetune.inference import load_for_inference
from finetune.serve import open_engine
from ttt import TTTArgs, TTTLMModel

FRAME_MS = 80.0
SILENT_DB = -50.0
SAME_ACROSS_ROWS = 0.02
"""Of what TTT has learned: rows of one batch are rounded alike, up to the tails of kernels."""
WARM_UP_FRAMES = 8
SHARE = Path(__file__).parents[1] / "example/demo/model"


def random_parts(args: argparse.Namespace, device: torch.device) -> tuple[TTTLMModel, Codec]:
    every = max(1, (32 if device.type == "cuda" else 8) // args.ttt_layers)
    start = 2 if device.type == "cuda" else 0
    size = 64 if device.type == "cuda" else 8
    ttt_args = TTTArgs(enabled=True, start_layer=start, layer_frequency=every, chunk_size=size)
    model = make_model(ttt_args, device)
    config = None
    if device.type != "cuda":
        config = json.loads((SHARE / "mimi_config.json").read_text())
        config["quantizer"]["bins"] = model.card
    mimi = loaders.get_mimi(None, config, num_codebooks=8, device=device)
    tokenizer = sentencepiece.SentencePieceProcessor(str(SHARE / "tokenizer.model"))
    return model, Codec(mimi, tokenizer, moshi_codebooks=8, user_codebooks=8, device=device)


def run(model: TTTLMModel, codec: Codec, callers: int, args: argparse.Namespace) -> dict:
    """Measure one table line; leave the program if what was computed is wrong."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rng = np.random.default_rng(0)
    voice = 0.1 * rng.standard_normal((100, int(codec.mimi.frame_size))).astype(np.float32)
    step_ms: list[float] = []
    parts: list[dict] = []
    texts: list[int] = []
    levels: list[float] = []
    torch.manual_seed(0)
    greedy = {} if args.checkpoint else {"temperature": 0.0, "text_temperature": 0.0}
    with open_engine(model, codec, max_users=callers, **greedy) as engine:
        rows = [row for _ in range(callers) if (row := engine.join()) is not None]
        for index in range(args.frames):
            started_at = time.perf_counter()
            spoken = engine.step({row.index: voice[index % len(voice)] for row in rows})
            # What is spoken is on the host: the device has done all of it.
            step_ms.append(1e3 * (time.perf_counter() - started_at))
            if not all(each.healthy for each in spoken.values()):
                sys.exit(f"wrong: {callers} callers, frame {index}: not all is finite")
            texts.append(spoken[0].text_token)
            sound = torch.from_numpy(spoken[0].audio)[None]
            levels.append(float(frame_levels_db(sound, sound.shape[1])[0, 0]))
            if (index + 1) % args.part_frames == 0:
                parts.append(part_of(codec, step_ms, texts, levels, engine.changes(), args))
                print(json.dumps({"frames": index + 1} | parts[-1]), flush=True)
        changes = engine.changes()
        state_gb = callers * engine.row_bytes() / 1e9
    for layer, by_row in changes.items():
        if not args.checkpoint and max(by_row) - min(by_row) > SAME_ACROSS_ROWS * max(by_row):
            sys.exit(f"wrong: rows that hear the same have learned otherwise in layer {layer}")
        if args.frames > model.ttt_args.update_frames and not max(by_row) > 0:
            sys.exit(f"wrong: layer {layer} has learned nothing")
    timed = np.array(step_ms[WARM_UP_FRAMES:])
    return {
        "callers": callers,
        "median_ms": round(float(np.median(timed)), 2),
        "p99_ms": round(float(np.percentile(timed, 99)), 2),
        "over_80_ms": round(float((timed > FRAME_MS).mean()), 4),
        "state_gb": round(state_gb, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "changes": {layer: round(by_row[0], 4) for layer, by_row in changes.items()},
    }


def part_of(
    codec: Codec,
    step_ms: list[float],
    texts: list[int],
    levels: list[float],
    changes: dict[int, list[float]],
    args: argparse.Namespace,
) -> dict:
    """The last `part_frames` of a long call: time, memory, and the health of what is said."""
    last = slice(-args.part_frames, None)
    times = np.array(step_ms[last])
    said = torch.tensor(texts[last])[None].repeat(2, 1)
    health = measure(codec, said, torch.tensor(levels[last]), SILENT_DB)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "median_ms": round(float(np.median(times)), 2),
        "p99_ms": round(float(np.percentile(times, 99)), 2),
        "host_mb": round(pages * 4096 / 1e6, 1),
        "changes": {layer: round(by_row[0], 4) for layer, by_row in changes.items()},
        "padding_share": round(health["padding_share"], 3),
        "silence_share": round(health["silence_share"], 3),
        "text_entropy": round(health["entropy"], 3),
    }


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--part-frames", type=int, default=3750, help="a line each so many")
    parser.add_argument("--ttt-layers", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.checkpoint:
        model, codec = load_for_inference(args.checkpoint, args.device)
    else:
        model, codec = random_parts(args, device)
    found = []
    for callers in args.callers:
        try:
            found.append(run(model, codec, callers, args))
        except torch.OutOfMemoryError:
            found.append({"callers": callers, "out_of_memory": True})
        print(json.dumps(found[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
