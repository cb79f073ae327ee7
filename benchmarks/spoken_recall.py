"""Milliseconds per step, and memory, of `evaluate --tasks spoken_recall` on Moshi 7B.

    python benchmarks/spoken_recall.py [--talks 2] [--distances 10 30 60] [--batch-size 6] [--out X]

The task as users run it, with all three arms, on Moshi 7B and Mimi with random weights. What such a
model answers is noise; what is measured is how long it takes, from the script of the talks to the
report's numbers. No time is reported unless every talk was heard to its end in every arm, all was
finite, and TTT had learned in the rows of the arm `on` and nothing in those of `off`.

On a machine without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calls import FRAME_MS, WARM_UP_FRAMES, Wrong, free_memory, memory_gb, random_parts
from outputs import json_file

from finetune.config import DataArgs, TrainArgs
from finetune.data import FRAME_RATE_HZ
from finetune.evaluation import Options
from finetune.evaluation.bench import Bench
from finetune.evaluation.tasks.spoken_recall import TASK, measure
from finetune.evaluation.tasks.spoken_recall.options import RecallOptions
from finetune.inference import check_attention_window
from finetune.kept import write_whole
from finetune.serve import Engine, Spoken, open_engine
from finetune.step import LossWeights

LOOK_EVERY_STEPS = 100


@dataclass
class Seen:
    """This holds what has been seen of the engine while the task used it."""

    step_ms: list[float] = field(default_factory=list)
    learned: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    """The largest change of any layer, in rows with TTT and in rows without."""

    @contextmanager
    def watched(self, *args: Any, **options: Any) -> Iterator[Engine]:
        """Open an engine whose steps are timed and whose fast weights are looked at."""
        with open_engine(*args, **options) as engine:
            step = engine.step

            def timed(frames: Mapping[int, np.ndarray]) -> dict[int, Spoken]:
                started_at = time.perf_counter()
                spoken = step(frames)
                # The tokens are on the host: the device has done all of it.
                self.step_ms.append(1e3 * (time.perf_counter() - started_at))
                if len(self.step_ms) % LOOK_EVERY_STEPS == 0:
                    self._look(engine)
                return spoken

            engine.step = timed  # type: ignore[method-assign]
            yield engine

    def _look(self, engine: Engine) -> None:
        for by_row in engine.changes().values():
            for row in engine.rows:
                if row.taken:
                    most = max(self.learned[row.ttt_on], by_row[row.index])
                    self.learned[row.ttt_on] = most


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run the task and return what it took.

    Raises:
        Wrong: what was computed is not what it should be.
    """
    free_memory(reset_peak=True)
    model, codec = random_parts(args, "on")
    wanted = RecallOptions(
        num_talks=args.talks,
        distances_sec=tuple(args.distances),
        num_facts=args.facts,
        answer_sec=args.answer_sec,
    )
    options = Options.complete()(
        checkpoint=out, tasks=(TASK.name,), out=out, batch_size=args.batch_size, recall=wanted
    )
    bench = Bench(
        options=options,
        args=TrainArgs(data=DataArgs(), run_dir=""),
        recordings=[],
        weights=LossWeights(1.0, 1.0),
        model=model,
        codec=codec,
        window_frames=check_attention_window(model),
        vocabulary={},
        identity={"model": "random weights"},
    )
    seen = Seen()
    began_at = time.perf_counter()
    talks = TASK.prepare(bench, options)
    measure.open_engine = seen.watched
    try:
        found = TASK.run(bench, options, talks)
    finally:
        measure.open_engine = open_engine
    whole_sec = time.perf_counter() - began_at
    if found["num_talks"] != args.talks or found["num_unhealthy"]:
        raise Wrong(f"{found['num_talks']} talks heard, {found['num_unhealthy']} not finite")
    if not seen.learned[True] > 0 or seen.learned[False] > 0:
        raise Wrong(f"changes of the fast weights with TTT and without: {seen.learned}")
    steps, num_steps = np.array(seen.step_ms[WARM_UP_FRAMES:]), len(seen.step_ms)
    audio_sec = 3 * sum(talk.duration_sec for talk in talks)
    step_ms = 1e3 * whole_sec / num_steps
    return {
        "talks": args.talks,
        "rows": min(args.batch_size, 3 * args.talks),
        "steps": num_steps,
        "median_ms": round(float(np.median(steps)), 2),
        "p99_ms": round(float(np.percentile(steps, 99)), 2),
        "over_80_ms": round(float((steps > FRAME_MS).mean()), 4),
        "whole_sec": round(whole_sec, 1),
        "whole_ms_per_step": round(step_ms, 2),
        "x_real_time": round(audio_sec / whole_sec, 1),
        "minutes_for_a_batch_of_hours": round(3600 * FRAME_RATE_HZ * step_ms / 60e3, 1),
        "learned": round(seen.learned[True], 4),
        **memory_gb(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--talks", type=int, default=2)
    parser.add_argument("--distances", type=float, nargs="+", default=[10.0, 30.0, 60.0])
    parser.add_argument("--facts", type=int, help="two more than distances if not given")
    parser.add_argument("--answer-sec", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--ttt-layers", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--out", type=json_file, help="the JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        args.chunk_size = min(args.chunk_size, 8)
    machine = {"machine": args.device, "torch": torch.__version__}
    if args.device.startswith("cuda"):
        machine["machine"] = torch.cuda.get_device_properties(args.device).name
    with tempfile.TemporaryDirectory() as folder:
        try:
            line = machine | run(args, Path(folder))
        except Wrong as wrong:
            sys.exit(f"wrong: {wrong}")
    print(json.dumps(line), flush=True)
    if args.out:
        write_whole(args.out, json.dumps(line, indent=1))
    return line


if __name__ == "__main__":
    main()
