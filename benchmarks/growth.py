"""Does anything grow that should not? Memory, open files and threads of long runs, as slopes.

A minimal model trains for thousands of steps, is evaluated hundreds of times, and speaks for half
an hour; the process is looked at all the while. A slope is a least-squares fit over the later two
thirds of what was seen: the beginning fills caches.

    python benchmarks/growth.py --steps 3000 --evaluations 200 --minutes 30
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.config import load_config
from finetune.demo.dialogues import make_dialogues
from finetune.inference import generate_codes, load_for_inference
from finetune.trainer import Trainer

ROOT = Path(__file__).parent.parent
FRAMES_PER_MINUTE = 750
MAX_SLOPE = {"memory_mb": 20.0, "files": 0.5, "threads": 0.5}
"""Per thousand: of steps or evaluations, or per thousand frames that were spoken."""
NOISE = {"memory_mb": 10.0, "files": 1.0, "threads": 1.0}
"""What may come and go without anything growing: in a short run that would be a slope."""


def look() -> dict[str, float]:
    """Return what this process holds now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),  # of C code as well
    }


def slopes(seen: Iterable[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Per thousand, over the later two thirds."""
    points = list(seen)
    points = points[len(points) // 3 :]
    x = np.array([at for at, _ in points]) / 1000
    return {
        name: float(np.polyfit(x, [found[name] for _, found in points], 1)[0])
        for name in points[0][1]
    }


def is_flat(found: dict[str, float], span: float) -> bool:
    """Return whether nothing grows, by slopes over `span` steps, evaluations or frames."""
    return all(
        value <= max(MAX_SLOPE[name], NOISE[name] / (span / 1000)) for name, value in found.items()
    )


def watched(name: str, total: int, step: Callable[[], object], *, unit: int = 1) -> bool:
    """Do `step` over and over; print the slopes, and say whether all are as good as flat."""
    seen = []
    every = max(1, total // 60)
    for number in range(1, total + 1):
        step()
        if number % every == 0:
            seen.append((float(number * unit), look()))
    found = slopes(seen)
    flat = is_flat(found, span=seen[-1][0] * 2 / 3)
    print(
        f"{name}: {seen[0][1]['memory_mb']:.0f} to {seen[-1][1]['memory_mb']:.0f} MB, "
        f"{seen[-1][1]['files']:.0f} files, {seen[-1][1]['threads']:.0f} threads; per thousand "
        + ", ".join(f"{key} {value:+.2f}" for key, value in found.items())
        + ("" if flat else "  GROWS"),
        flush=True,
    )
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.steps, options.evaluations, options.minutes)
    raise SystemExit(0 if all(results) else 1)


def measure(folder: Path, num_steps: int, num_evaluations: int, minutes: float) -> list[bool]:
    """Measure whether training, evaluation and generation are flat."""
    make_dialogues(folder / "data", num_dialogues=10, min_sec=4.0, max_sec=6.0)
    args = load_config(
        ROOT / "example/demo.yaml",
        {
            "run_dir": str(folder / "run"),
            "moshi_paths.hf_repo_id": str(ROOT / "example/demo/model"),
            "data.train_data": str(folder / "data/train.jsonl"),
            "data.eval_data": str(folder / "data/eval.jsonl"),
            "data.cache_dir": "null",
            "data.num_workers": 0,
            "do_eval": True,
            "health_sec": 0,
            "duration_sec": 1,
            "batch_size": 1,
            "max_steps": 10 * (num_steps + 1),
            "ckpt_freq": max(1, num_steps // 30),
            "log_freq": 1,
        },
    )
    run = Trainer(args)
    logging.getLogger("finetune").setLevel(logging.WARNING)

    def step() -> None:
        run.train_step()
        if run.is_due(args.ckpt_freq):
            run.save()

    with run.folder, run.metrics:
        results = [watched(f"{num_steps} steps, 30 checkpoints", num_steps, step)]
        results.append(watched(f"{num_evaluations} evaluations", num_evaluations, run.evaluate))
        if run.step > run.writer.last_step:
            run.save()
        run.writer.wait()
        run.folder.earn()
        run.train_data.close()
    saved = folder / f"run/checkpoints/checkpoint_{run.step:06d}"
    return [*results, speaks(saved, minutes)]


def speaks(saved: Path, minutes: float) -> bool:
    """Generation of that length in one go, looked at on the way, and its audio."""
    model, codec = load_for_inference(saved, "cpu")
    num_frames = round(minutes * FRAMES_PER_MINUTE)
    codes = torch.randint(0, 200, (1, 1 + model.n_q, num_frames))
    seen: list[tuple[float, dict[str, float]]] = []
    at = [0]
    forward = model.forward_text

    def counted(*arguments: Any, **named: Any) -> Any:
        at[0] += 1
        if at[0] % max(1, num_frames // 60) == 0:
            seen.append((float(at[0]), look()))
        return forward(*arguments, **named)

    model.forward_text = counted  # type: ignore[method-assign]
    said = generate_codes(model, codes, prompt_frames=0, temperature=0.8, text_temperature=0.7)
    found = slopes(seen)
    flat = is_flat(found, span=num_frames * 2 / 3)
    before = look()["memory_mb"]
    audio = codec.decode(said[:, 1:].clamp(min=0))
    print(
        f"{minutes:g} minutes spoken: {seen[0][1]['memory_mb']:.0f} to "
        f"{seen[-1][1]['memory_mb']:.0f} MB; per thousand frames "
        + ", ".join(f"{key} {value:+.2f}" for key, value in found.items())
        + f"; decoded to {audio.shape[-1] / codec.sample_rate_hz:.0f} s with "
        f"{look()['memory_mb'] - before:.0f} MB more" + ("" if flat else "  GROWS"),
        flush=True,
    )
    return flat


if __name__ == "__main__":
    main()
