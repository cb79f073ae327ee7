"""Peaks of GPU memory in training steps of Moshi, beside what `moshi-ttt plan` says.

    python benchmarks/peaks.py --json peaks.json
    python benchmarks/peaks.py --model tiny --device cpu --frames 40 --dtype float32

Six kinds of training that differ in all that `plan` reckons with: the type of the frozen base,
LoRA's rank or none, TTT, the optimizer's moments and the batch. Each model is made from random
weights as a training run makes it, straight onto the device, and takes two optimizer steps: in the
second all that a step keeps is there. The peak is what PyTorch has allocated. If it is further than
10 % from the plan, the exit status is 1. On a CPU nothing is measured but that it works.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from outputs import json_file, print_and_keep, settings
from small_gpu import GB, free, peaks, run_args
from training_arms import TINY, Arm, OurRun, random_codes

from finetune.model import load_model, plan_model
from finetune.plan import estimate

CASES: dict[str, dict[str, Any]] = {
    name: dict(zip(("base_precision", "rank", "ttt", "optim_state", "batch"), case, strict=True))
    for name, case in {
        "nf4, LoRA 64 and TTT, int8 moments, B 1": ("nf4", 64, "on", "int8", 1),
        "bfloat16, LoRA 128 and TTT, B 8": ("bfloat16", 128, "on", "float32", 8),
        "float8, TTT alone, B 8": ("float8", 0, "on", "float32", 8),
        "bfloat16, TTT alone, B 8": ("bfloat16", 0, "on", "float32", 8),
        "nf4, TTT alone, B 8": ("nf4", 0, "on", "float32", 8),
        "bfloat16, LoRA 128, B 4": ("bfloat16", 128, "off", "float32", 4),
    }.items()
}
"""By name; `small_gpu.run_args` says what the options mean."""
NUM_STEPS = 2
WITHIN = 0.1
"""How far a peak may be from the plan, relative to what was measured."""


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.cases:
        started = time.monotonic()
        try:
            found = measure(argparse.Namespace(**{**vars(options), **CASES[name]}))
        except torch.OutOfMemoryError:
            found = {"wrong": "out of memory"}
        gc.collect()
        yield {"name": name, **found, "total_sec": time.monotonic() - started}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the peak of a case, and what was planned."""
    nothing = Path("none")
    shape = TINY if options.model == "tiny" else None
    info = loaders.CheckpointInfo(nothing, nothing, nothing, lm_config=shape)
    args = run_args(options, options.batch)
    planned = {"planned_gb": estimate(args, plan_model(args, info), 1).peak / GB}
    free(options)
    before = {f"before_{key}": value for key, value in peaks(options).items()}
    model = load_model(args, info, options.device)
    run = OurRun(model, options, optim=args.optim)
    codes = random_codes(options.batch, Arm(""), options)
    free(options)
    losses = [run.step(codes) for _ in range(NUM_STEPS)]
    found: dict[str, Any] = {"losses": losses, **peaks(options), **planned, **before}
    if not all(map(math.isfinite, losses)):
        return found | {"wrong": "losses are no numbers"}
    if "peak_gb" not in found:
        return found
    found["planned_ratio"] = found["planned_gb"] / found["peak_gb"]
    if abs(found["planned_ratio"] - 1) > WITHIN:
        found["wrong"] = f"further than {WITHIN:.0%} from the plan"
    return found


HEADER = f"{'':<42}{'peak GB':>9}{'planned':>9}{'ratio':>7}{'reserved':>10}{'s':>6}"


def line(result: dict[str, Any]) -> str:
    text = f"{result['name']:<42}"
    for key, width, form in (
        ("peak_gb", 9, ".2f"), ("planned_gb", 9, ".2f"), ("planned_ratio", 7, ".3f"),
        ("reserved_gb", 10, ".2f"), ("total_sec", 6, ".0f"),
    ):  # fmt: skip
        text += f"{result[key]:>{width}{form}}" if key in result else " " * width
    return text + (f"  {result['wrong'].upper()}" if "wrong" in result else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--frames", type=int, default=1250)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    options.schedule_steps = 20
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, T {options.frames}\n{HEADER}")
    page = settings(name, options, torch.__version__)
    return print_and_keep(results(options), line, page, options.json)


if __name__ == "__main__":
    sys.exit(int(any("wrong" in result for result in main())))
