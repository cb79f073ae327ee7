"""Training and streaming of Moshi 7B within the memory of a small GPU, with a base in fewer bits.

    python benchmarks/small_gpu.py --limit-gb 24 --base-precision nf4 --batch 1 8
    python benchmarks/small_gpu.py --model tiny --device cpu --base-precision nf4 --frames 100

The process may take no more than `--limit-gb` of the GPU. The model is made as a training run makes
it, from random weights, straight onto the device; LoRA and In-Place TTT train. For each batch size:
seconds of a step, tokens per second, and the peak, beside what `moshi-ttt plan` estimates. After
the first the same model streams with stock `LMGen`: milliseconds per frame, which has 80, and its
peak.

No time is reported of steps whose losses are no numbers or do not fall, nor of a stream whose
frames are not all there; the exit status is then 1. Tokens are counted as in `train_step.py`.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from moshi.models import loaders
from outputs import json_file, print_and_keep, settings
from streaming import median, run_stream
from training_arms import TINY, TTT, Arm, OurRun, random_codes

from finetune.config import DataArgs, LoraArgs, ModelPaths, OptimArgs, Precision, TrainArgs
from finetune.model import load_model, plan_model
from finetune.plan import estimate
from ttt import TTTArgs, TTTLMModel

GB = 1e9


def run_args(options: argparse.Namespace, batch: int) -> TrainArgs:
    """The configuration of a training run on random weights."""
    layers = {"start_layer": 1} if options.model == "tiny" else {}
    ttt: Any = {**layers, **TTT["in_place delta"]} if options.ttt == "on" else {}
    return TrainArgs(
        data=DataArgs(),
        run_dir="",
        moshi_paths=ModelPaths(hf_repo_id=None, random_init=True),
        optim=OptimArgs(lr=options.lr, state=options.optim_state),
        lora=LoraArgs(enable=options.rank > 0, rank=options.rank),
        ttt=TTTArgs(enabled=options.ttt == "on", **ttt),
        duration_sec=options.frames / 12.5,
        batch_size=batch,
        base_precision=options.base_precision,
        param_dtype=options.dtype,
        compile=options.device == "cuda",
    )


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    nothing = Path("none")
    shape = TINY if options.model == "tiny" else None
    info = loaders.CheckpointInfo(nothing, nothing, nothing, lm_config=shape)
    args = run_args(options, options.batch[0])
    started = time.monotonic()
    model = load_model(args, info, options.device)
    page = {"what": "load", "sec": time.monotonic() - started, **peaks(options)}
    yield page
    for number, batch in enumerate(options.batch):
        planned = estimate(run_args(options, batch), plan_model(args, info), 1).peak / GB
        try:
            yield train(model, batch, options) | {"planned_gb": planned}
        except torch.OutOfMemoryError:
            yield {"what": "train", "batch": batch, "wrong": "out of memory", "planned_gb": planned}
        # The optimizer goes, with the copies of the weights that it steps.
        for parameter in model.parameters():
            parameter.grad, parameter._post_accumulate_grad_hooks = None, None
        if number == 0:
            yield stream(model, options)


def train(model: TTTLMModel, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Losses of a few optimizer steps on one batch, their median time, and the peak."""
    optim = run_args(options, batch).optim
    run, codes = OurRun(model, options, optim=optim), random_codes(batch, Arm(""), options)
    free(options)
    losses, seconds = [], []
    for _ in range(options.warmup + options.steps):
        begin = time.perf_counter()
        losses.append(run.step(codes))
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    found = {"what": "train", "batch": batch, "losses": losses, **peaks(options)}
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        return found | {"wrong": "losses are no numbers, or do not fall"}
    step_sec = statistics.median(seconds[options.warmup :])
    tokens = batch * options.frames * (1 + model.dep_q)
    return found | {
        "step_sec": step_sec,
        "first_step_sec": seconds[0],
        "tokens_per_sec": tokens / step_sec,
    }


def stream(model: TTTLMModel, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per frame of one stream, and the peak."""
    model.eval()
    free(options)
    codes = random_codes(1, Arm(""), options)[:, :, : options.stream_frames]
    with torch.no_grad():
        done = run_stream(model, codes, graphs=True)
    found = {"what": "stream", **peaks(options)}
    # The first frames that come out are late by the largest delay.
    num_frames = codes.shape[2] - max(model.delays)
    if done.tokens.shape[2] != num_frames or done.tokens.unique().numel() < 2:
        return found | {"wrong": f"{tuple(done.tokens.shape)} tokens, of {num_frames} frames"}
    step_ms = done.step_ms[len(done.step_ms) // 4 :]
    return found | {"median_ms": median(step_ms), "max_ms": max(step_ms)}


def free(options: argparse.Namespace) -> None:
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(options: argparse.Namespace) -> dict[str, float]:
    if options.device != "cuda":
        return {}
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / GB,
        "reserved_gb": torch.cuda.max_memory_reserved() / GB,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--base-precision", default="nf4", choices=get_args(Precision))
    parser.add_argument("--optim-state", default="float32", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--ttt", default="on", choices=["on", "off"])
    parser.add_argument("--limit-gb", type=float, default=24.0, help="that the process may take")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--frames", type=int, default=1250)
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=4, help="steps that are")
    parser.add_argument("--stream-frames", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    options.schedule_steps = max(20, options.warmup + options.steps + 1)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    name = "CPU"
    if options.device == "cuda":
        name, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_gb * GB / total))
    page = settings(name, options, torch.__version__)
    print(json.dumps(page), flush=True)
    return print_and_keep(results(options), json.dumps, page, options.json)


if __name__ == "__main__":
    sys.exit(int(any("wrong" in result for result in main())))
