"""Milliseconds per frame of calls, whole: Mimi in, model, Mimi out; and whether an hour is like its
first five minutes.

    python benchmarks/calls.py [--callers 1 4 8 16 32] [--ttt on off] [--limit-sec 230] [--out X]
    python benchmarks/calls.py --callers 32 16 --ttt on --begin apart together --limit-sec 140
    python benchmarks/calls.py --checkpoint RUN/checkpoints/checkpoint_N --callers 1 --frames 45000

Moshi 7B and Mimi with random weights, or a checkpoint. With random weights all callers say the same
noise, and Moshi says in all rows what it says in the first, so that all rows must learn the same.
No time is reported unless they do, and unless every step was healthy in every row. The callers of a
checkpoint say what the users of the demonstration's dialogues do, over and over.

All callers come at the same moment. They begin as the server lets them (`--begin apart`), so that
their chunks end in different frames, or all in the same frame (`together`), which is the most that
a step can have to do. Only steps with all callers are timed. `by_chunk_ends` has the times by the
number of rows whose chunk ends in a frame, and `longest_wait_ms` what the last caller waits for.

Of a checkpoint's first caller, the text logits are compared with those of the same codes in blocks,
from the first frame on and with the same attention window: `reference` has the differences, which
may grow to ten times what they are at first and no further.

The file is written anew after every line and every part of a call: what a run that is cut off has
measured is there, under `unfinished_after_frames`.

On a machine without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from callers import DEMO, Ends, Heard, follow_first_row, join_all, times, voices
from moshi.models import loaders
from outputs import json_file
from same_window import Tape
from streaming import make_model

from finetune.data import Codec
from finetune.evaluation.tasks.health.measure import alarms, silent_below_db
from finetune.inference import load_for_inference
from finetune.kept import write_whole
from finetune.serve import Engine, Row, open_engine
from ttt import TTTArgs, TTTLMModel

FRAME_MS = 80.0
SAME_ACROSS_ROWS = 0.02
"""Of what TTT has learned: rows of one batch are rounded alike, up to the tails of kernels."""
WARM_UP_FRAMES = 8
"""Frames that are not timed: kernels are compiled, and graphs captured."""
FEWEST_TIMED = 40
FACTOR, FLOAT32_ERROR = 10.0, 1e-4
"""A later difference from the reference may be so many times the first, or so large in any case."""


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


def run(
    model: TTTLMModel,
    codec: Codec,
    line: dict[str, Any],
    args: argparse.Namespace,
    save: Callable[[], None],
) -> None:
    """Measure one line of the table, and fill it in.

    Args:
        line: what is to be measured.
        save: called whenever there is more in the line.

    Raises:
        Wrong: what was computed is not healthy, or not the same in all rows.
    """
    free_memory(reset_peak=True)
    # Before the engine has the codec to itself.
    silent_db = silent_below_db(codec)
    voice = voices(args, codec)
    heard = Heard()
    parts: list[dict[str, Any]] = []
    asked, callers, ends = dict(line), line["callers"], Ends(model)
    with open_engine(model, codec, max_users=callers) as engine:
        rows = join_all(engine, line)
        longest_wait_frames = max(row.begin_frame for row in rows)
        step_ms, done = np.zeros(args.frames + longest_wait_frames), 0
        follow_first_row(engine, heard, rows, same=not args.checkpoint)
        tape = Tape(engine, args.frames, args.part_frames) if args.checkpoint else None
        torch.manual_seed(0)
        began_at = time.perf_counter()
        engine.step({})
        begin_sec = time.perf_counter() - began_at
        while done < len(step_ms) and left_sec(args) > 0:
            # Each row hears as many frames as the others, but they begin and end apart.
            frames = {
                row.index: voice[(done - row.begin_frame) % len(voice)]
                for row in rows
                if 0 <= done - row.begin_frame < args.frames
            }
            started_at = time.perf_counter()
            # What is spoken is on the host: the device has done all of it.
            spoken = engine.step(frames)
            step_ms[done] = 1e3 * (time.perf_counter() - started_at)
            if not all(each.healthy for each in spoken.values()):
                raise Wrong(f"frame {done}: not all is finite")
            ends.look(frames)
            if 0 in spoken:
                heard.add(spoken[0])
            done += 1
            if done % args.part_frames == 0 and done <= args.frames:
                last = step_ms[done - args.part_frames : done]
                parts.append(part_of(last, heard.health(codec, silent_db), engine))
                compare(parts[-1], parts[0])
                report(asked | {"frames": done} | parts[-1])
                line |= {"unfinished_after_frames": done, "parts": parts}
                save()
        changes = engine.changes()
        state_gb = callers * engine.row_bytes() / 1e9
    line.pop("unfinished_after_frames", None)
    # Only frames with all callers count.
    counts = slice(max(WARM_UP_FRAMES, longest_wait_frames), min(done, args.frames))
    timed = step_ms[counts]
    if len(timed) < min(FEWEST_TIMED, args.frames - WARM_UP_FRAMES - longest_wait_frames):
        line |= {"skipped": f"time was up after {done} frames", "parts": parts}
        return
    if line["ttt"] == "on":
        check_changes(model, changes, rows, args)
    line |= times(timed) | {
        "frames": done,
        "first_step_sec": round(begin_sec + step_ms[:2].sum() / 1e3, 1),
        "over_80_ms": round(float((timed > FRAME_MS).mean()), 4),
        "longest_wait_ms": round(FRAME_MS * longest_wait_frames),
        "by_chunk_ends": ends.times(step_ms, counts),
        "state_gb": round(state_gb, 6),
        **memory_gb(),
        "changes": {layer: round(by_row[0], 4) for layer, by_row in changes.items()},
        **whole_call(parts),
        **({"reference": tape.compare(model)} if tape else {}),
        "parts": parts,
    }
    if tape:
        check_reference(line["reference"]["difference_from_frame"])


def check_reference(differences: dict[int, float]) -> None:
    """Check the differences from the reference, by frame.

    Raises:
        Wrong: one is much larger than the first.
    """
    allowed = max(FACTOR * differences[0], FLOAT32_ERROR)
    for frame, difference in differences.items():
        if not difference <= allowed:
            raise Wrong(
                f"from frame {frame} on the text logits are {difference:.1e} from the reference's, "
                f"of which {allowed:.1e} is allowed"
            )


def check_changes(
    model: TTTLMModel, changes: dict[int, list[float]], rows: list[Row], args: argparse.Namespace
) -> None:
    """Compare rows that have written as often; all have, unless time was up."""
    num_writes = [row.num_steps // model.ttt_args.update_frames for row in rows]
    for layer, by_row in changes.items():
        for number in set(num_writes):
            alike = [by_row[r.index] for r, n in zip(rows, num_writes, strict=True) if n == number]
            if not args.checkpoint and max(alike) - min(alike) > SAME_ACROSS_ROWS * max(alike):
                raise Wrong(f"layer {layer} has learned otherwise in other rows: {by_row}")
            if number and not max(alike) > 0:
                raise Wrong(f"layer {layer} has learned nothing")


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


def whole_call(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how the later parts of a call differ from its first, at the worst."""
    later = [part["against_first"] for part in parts[1:]]
    if not later:
        return {}
    alarmed = sorted({alarm for part in later for alarm in part["alarms"]})
    worst = {name: max(part[name] for part in later) for name in ("median", "host_mb")}
    return {"against_first": worst | {"alarms": alarmed}}


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


def measure_all(
    use: str, args: argparse.Namespace, found: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Add the lines of the table with TTT, or of that without, to `found`."""
    began_at = time.perf_counter()
    if args.checkpoint:
        model, codec = load_for_inference(args.checkpoint, args.device)
    else:
        model, codec = random_parts(args, use)
    built_sec = round(time.perf_counter() - began_at, 1)
    report({"ttt": use, "layers": list(model.ttt_layers), "built_sec": built_sec} | memory_gb())
    # Without TTT nobody waits.
    begins = args.begin if use == "on" else args.begin[-1:]
    for callers, begin in product(args.callers, begins):
        line = {"callers": callers, "ttt": use, "begin": begin}
        found.append(line)
        if left_sec(args) < 0:
            line |= {"skipped": "time was up"}
        else:
            try:
                run(model, codec, line, args, save)
            except Wrong as wrong:
                line |= {"wrong": str(wrong)}
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                line |= {"out_of_memory": str(error).splitlines()[0]} | memory_gb()
        report({name: value for name, value in line.items() if name != "parts"})
        save()


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--part-frames", type=int, default=3750, help="a line each so many")
    parser.add_argument("--ttt", nargs="+", choices=["on", "off"], help="on, and off without C")
    parser.add_argument(
        "--begin",
        nargs="+",
        choices=["apart", "together"],
        help="as the server lets callers begin, or all in one frame; both, and apart with C",
    )
    parser.add_argument("--ttt-layers", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--limit-sec", type=float, default=float("inf"), help="after the imports")
    parser.add_argument("--out", type=json_file, help="the JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.checkpoint and "off" in (args.ttt or ()):
        parser.error("--checkpoint is compared with a reference that uses TTT: leave --ttt out")
    args.begin = args.begin or (["apart"] if args.checkpoint else ["apart", "together"])
    args.ends_at = time.perf_counter() + args.limit_sec
    if args.device == "cpu" and not args.checkpoint:
        args.chunk_size = min(args.chunk_size, 8)
    machine = {"machine": args.device, "torch": torch.__version__}
    if args.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(args.device)
        machine |= {"machine": properties.name, "gb": round(properties.total_memory / 1e9, 1)}
    report(machine)
    found: list[dict[str, Any]] = []

    def save() -> None:
        if args.out:
            write_whole(args.out, json.dumps(machine | {"lines": found}, indent=1))

    for use in args.ttt or (["on"] if args.checkpoint else ["on", "off"]):
        measure_all(use, args, found, save)
        free_memory()
    if wrong := [
        f"{line['callers']} callers: {line['wrong']}" for line in found if "wrong" in line
    ]:
        sys.exit(f"wrong: {'; '.join(wrong)}")
    return found


if __name__ == "__main__":
    main()
