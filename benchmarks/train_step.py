"""Training steps of Moshi: the stock model in a plain loop, and ours, with the same losses.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --model tiny --device cpu --dtype float32 --batch 2 --frames 40

Every line is a run of a few optimizer steps on the same codes from the same weights. `stock` is
`moshi.models.lm.LMModel` as `moshi-finetune` trains it: activation checkpointing, logits, cross
entropy in float32, AdamW on float32 copies of the weights. Its losses are what the others' are
compared with: of every step without TTT, and of the first step with TTT, which then has learned
nothing yet. Where they differ, or are no numbers, no time is reported, and the exit status is 1.
The stock model's line of the same kind (LoRA or full) is run with every choice of `--arms`.

A base in fewer bits (`float8`, `nf4`: see `base_precision`) is another model: its first loss is
compared with that of the stock model on the same rounded weights, in the plainest way, by a bound
that is taken from two such forms. Its distance from the stock model in bfloat16 is reported as
well. Its time is reported in any case; beyond the bound it is marked, and the exit status is 1.

Tokens are counted as `moshi-finetune` counts them: 9 a frame. MFU is against 989 TFLOP/s, of

    2 N (2 (P + L) + G) + 12 N T' d layers

operations a step, for N frames: P weights that multiply, L of them in LoRA, G weights that train,
and T' frames that attention sees on average. What is computed twice does not count, nor does what
TTT does at test time.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from outputs import folder, json_file, print_and_keep, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_arms import (
    TTT,
    Arm,
    OurRun,
    StockRun,
    Weights,
    lm_kwargs,
    random_codes,
)

from finetune.model import parameters_by_role
from ttt.layers.frozen import num_frozen

OUT_OF_MEMORY = "out of memory"
PEAK_FLOPS = 989e12
"""Of an H100 or H200 in bfloat16, without sparsity."""
TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
"""How far a loss may be from the stock model's, in nats; see docs/benchmarks.md."""
FACTOR = 4.0
"""Of what two plain forms of a base in fewer bits differ by, as in `same_losses.py`."""
SELECTIVE_ARMS: dict[str | None, str] = {
    None: "ours",
    "in_place hidden": "ours, in_place hidden",
    "mlp": "ours, mlp",
}
"""TTT of the arms of which some layers keep their products, and what their names begin with."""


def arms(options: argparse.Namespace) -> Iterator[Arm]:
    compile = options.compile
    yield Arm("stock", is_stock=True)
    yield Arm("ours", compile=compile)
    for base in ("float8", "nf4"):
        yield Arm(f"ours, {base}", compile=compile, base=base)
        selective = f"ours, {base}, selective"
        yield Arm(selective, checkpointing="selective", compile=compile, base=base)
        yield Arm(f"ours, {base}, in_place delta", ttt="in_place delta", compile=compile, base=base)
    for name in TTT:
        yield Arm(f"ours, {name}", ttt=name, compile=compile)
    yield Arm("ours, selective", checkpointing="selective", compile=compile)
    for number in options.selective_layers:
        for ttt, ours in SELECTIVE_ARMS.items():
            name = f"{ours}, selective in {number}"
            yield Arm(name, ttt=ttt, selective_layers=number, compile=compile)
    yield Arm("ours, eager", compile=False)
    yield Arm("stock, full", is_stock=True, is_full=True)
    yield Arm("ours, full", is_full=True, compile=compile)


# Measuring ----------------------------------------------------------------------------------------


def operations(model: LMModel, arm: Arm, batch: int, options: argparse.Namespace) -> float:
    """Return the operations of a step; see this file's text."""
    kwargs, own = lm_kwargs(arm, options), parameters_by_role(model)
    lora = sum(p.numel() for p in own.get("lora", {}).values())
    base = sum(p.numel() for p in own["base"].values() if p.dim() == 2) + num_frozen(model)
    trained = base if arm.is_full else lora
    frames, window = batch * options.frames, min(kwargs["context"], options.frames)
    seen = window * (1 - (window - 1) / 2 / options.frames)
    attention = 6 * 2 * frames * seen * kwargs["dim"] * kwargs["num_layers"]
    return 2 * frames * (2 * (base + lora) + trained) + attention


def measure(arm: Arm, weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """Losses, median seconds per step and peak memory."""
    is_cuda = options.device == "cuda"
    batch = arm.batch or options.batch
    started = time.monotonic()
    model = weights.stock(arm) if arm.is_stock else weights.ours(arm)
    make: Callable[..., Any] = StockRun if arm.is_stock else OurRun
    run = make(model, options)
    codes = random_codes(batch, arm, options)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(options.warmup + options.steps):
        begin = time.perf_counter()
        losses.append(run.step(codes))
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    step_sec = statistics.median(seconds[options.warmup :])
    result = {
        "name": arm.name,
        "batch": batch,
        "losses": losses,
        "step_sec": step_sec,
        "all_step_sec": seconds,
        "tokens_per_sec": batch * options.frames * (1 + model.dep_q) / step_sec,
        "mfu": operations(model, arm, batch, options) / step_sec / PEAK_FLOPS,
        "total_sec": time.monotonic() - started,
    }
    if is_cuda:
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["resident_gb"] = torch.cuda.memory_allocated() / 1e9
    if options.profile and arm.name in options.profile:
        profile(run, codes, arm, options)
    return result


def profile(run: Any, codes: Tensor, arm: Arm, options: argparse.Namespace) -> None:
    """Return where a step's time goes: milliseconds, calls and name of each kernel (or
    operator)."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        run.step(codes)
    rows = [
        (e.self_device_time_total or e.self_cpu_time_total, e.count, e.key)
        for e in profiler.key_averages()
    ]
    total = sum(time_us for time_us, _, _ in rows)
    lines = [f"{total / 1e3:10.1f}{'':>7}  all"]
    for time_us, count, name in sorted(rows, reverse=True):
        lines.append(f"{time_us / 1e3:10.2f}{count:>7}  {name[:150]}")
    name = arm.name.replace(", ", "_").replace(" ", "_")
    (options.profile_dir / f"profile_{name}.txt").write_text("\n".join(lines) + "\n")


def chosen_arms(options: argparse.Namespace) -> list[Arm]:
    """Return the arms in the table's order, with the stock arms that they are compared with."""
    chosen = [arm for arm in arms(options) if not options.arms or arm.name in options.arms]
    kinds = {arm.is_full for arm in chosen}
    return [
        arm for arm in arms(options) if arm in chosen or (arm.is_stock and arm.is_full in kinds)
    ]


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every arm's, with what is wrong with it, or how it compares with the stock model."""
    weights = Weights(options)
    baselines: dict[bool, dict[str, Any]] = {}
    plain_forms: dict[tuple[str, str | None], dict[str, Any]] = {}
    for arm in chosen_arms(options):
        result = attempt(arm, weights, options)
        stock = result if arm.is_stock else baselines[arm.is_full]
        reference = None
        if arm.base != "bfloat16" and "losses" in result:
            kind = arm.base, arm.ttt
            if kind not in plain_forms:
                plain_forms[kind] = attempt_plain(arm, weights, options)
            reference = plain_forms[kind]
        result = judged(result, arm, stock, options, reference)
        if arm.is_stock:
            baselines[arm.is_full] = result
        yield result
        if options.search and arm.name == "ours, selective" and "peak_gb" in result:
            yield from search(result, weights, baselines.get(False), options)


def attempt(arm: Arm, weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return measure(arm, weights, options)
    except torch.OutOfMemoryError:
        return {"name": arm.name, "batch": arm.batch or options.batch, "wrong": OUT_OF_MEMORY}
    finally:
        tidy(options)


def tidy(options: argparse.Namespace) -> None:
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def judged(
    result: dict[str, Any],
    arm: Arm,
    stock: dict[str, Any] | None,
    options: argparse.Namespace,
    plain: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`result` with its ratio to the stock model; without its times if its losses differ from the
    stock model's. With a mark, if its base is in fewer bits and its first loss is another than on
    the same weights in the plainest way, `plain`."""
    if "losses" not in result:
        return result
    kept = {key: result[key] for key in ("name", "batch", "losses")}
    if not all(map(math.isfinite, result["losses"])):
        return {**kept, "wrong": "losses are not finite"}
    if stock is None or "wrong" in stock:
        return {**kept, "wrong": "not compared: there is no result of the stock model"}
    # Another batch has other losses; that of the same size has been compared.
    if result["batch"] == stock["batch"]:
        num_compared = 1 if arm.ttt or plain else None
        expected = plain or stock
        pairs = list(zip(result["losses"], expected["losses"], strict=False))[:num_compared]
        difference = kept["loss_difference"] = max(abs(a - b) for a, b in pairs)
        if plain is None and difference > options.tolerance:
            return {**kept, "wrong": f"losses differ from the stock model's by {difference:.1e}"}
        result["loss_difference"] = difference
        if plain is not None:
            result["from_stock"] = result["losses"][0] - stock["losses"][0]
            if math.isnan(plain["bound"]):
                del result["loss_difference"]
                result["wrong"] = "not compared: no memory for the same weights in the plainest way"
            else:
                result["bound"] = plain["bound"]
            if difference > plain["bound"]:
                result["wrong"] = f"beyond the bound of {plain['bound']:.1e}"
    result["speedup"] = result["tokens_per_sec"] / stock["tokens_per_sec"]
    return result


def attempt_plain(arm: Arm, weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """Return the same as `plain`; without memory for it nothing is within the bound."""
    try:
        return plain(arm, weights, options)
    except torch.OutOfMemoryError:
        return {"losses": [math.nan], "bound": math.nan}
    finally:
        tidy(options)


def plain(arm: Arm, weights: Weights, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a base in fewer bits is compared with: the first loss of the stock model that
    computes with the same weights in the plainest way, and how far ours may be from it. On other
    weights, such as those in full, it would be another model with other losses."""
    model = weights.stock(replace(arm, is_stock=True)).eval()
    run, codes = StockRun(model, options), random_codes(arm.batch or options.batch, arm, options)
    with torch.no_grad():
        sums = run.sums(codes)
        loss = sum((total / weight).item() for total, weight in sums)
        with sdpa_kernel(SDPBackend.MATH):
            rows = [run.sums(row) for row in codes.split(1)]
        parts = [sum(row[k][0] for row in rows) / sums[k][1] for k in range(2)]
    otherwise = sum(part.item() for part in parts)
    bound = max(options.tolerance, FACTOR * abs(loss - otherwise))
    return {"losses": [loss], "bound": bound}


def search(
    known: dict[str, Any],
    weights: Weights,
    stock: dict[str, Any] | None,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The largest batch with selective checkpointing. What is `known` of a smaller one says where
    to look."""
    total_gb = torch.cuda.mem_get_info()[1] / 1e9
    per_row = (known["peak_gb"] - known["resident_gb"]) / known["batch"]
    batch = int((0.95 * total_gb - known["resident_gb"]) / per_row)
    while batch > options.batch:
        name = f"ours, selective, B = {batch}"
        arm = Arm(name, checkpointing="selective", compile=options.compile, batch=batch)
        result = judged(attempt(arm, weights, options), arm, stock, options)
        # To be out of memory is what it looks for.
        yield {**result, "is_search": True}
        if "wrong" not in result:
            return
        batch -= max(1, batch // 20)


HEADER = (
    f"{'':<30}{'B':>4}{'s/step':>9}{'tokens/s':>11}{'x stock':>9}{'MFU':>7}{'peak GB':>9}"
    f"{'first loss':>12}{'differs':>10}"
)


def line(result: dict[str, Any]) -> str:
    text = f"{result['name']:<30}{result['batch']:>4}"
    if "step_sec" not in result:
        return f"{text}  {result['wrong']}"
    text += f"{result['step_sec']:>9.3f}{result['tokens_per_sec']:>11.0f}"
    text += f"{result['speedup']:>9.2f}" if "speedup" in result else f"{'':>9}"
    text += f"{result['mfu']:>7.1%}{result.get('peak_gb', 0):>9.1f}{result['losses'][0]:>12.4f}"
    text += f"{result['loss_difference']:>10.1e}" if "loss_difference" in result else ""
    if "from_stock" in result:
        text += f"  ({result['from_stock']:+.1e} from stock in full)"
    return text + (f"  {result['wrong'].upper()}" if "wrong" in result else "")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=1250)
    parser.add_argument("--rank", type=int, default=128, help="of LoRA")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--full-layers", type=int, default=8, help="of 32, in full fine-tuning")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="lines of the table; default: all")
    parser.add_argument(
        "--selective-layers",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="more arms, in which N layers keep what `selective` keeps in all",
    )
    parser.add_argument("--search", action="store_true", help="for the largest batch (CUDA)")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=4, help="steps that are")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tolerance", type=float, help="of losses, in nats; default: by dtype")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--profile", nargs="*", help="arms whose kernels are listed in a file")
    parser.add_argument("--profile-dir", type=folder, default=Path())
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    if options.tolerance is None:
        options.tolerance = TOLERANCE[options.dtype]
    options.compile, options.frees_base = options.device == "cuda", True
    options.varied_rows = False
    names = [arm.name for arm in arms(options)]
    num_layers = lm_kwargs(Arm("ours"), options)["num_layers"]
    numbers = options.selective_layers
    if len(set(numbers)) < len(numbers) or not all(0 < n <= num_layers for n in numbers):
        parser.error(f"--selective-layers: expected different numbers of 1 to {num_layers}")
    for option, chosen in (("--arms", options.arms), ("--profile", options.profile)):
        for name in chosen or []:
            if name not in names:
                parser.error(f"{option}: there is no {name!r}; choose from {', '.join(names)}")
    # The learning rate is at its highest from the second step on: a wrong gradient shows.
    options.schedule_steps = max(20, options.warmup + options.steps + 1)
    options.ttt_layers = {"start_layer": 1} if options.model == "tiny" else {}
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, T {options.frames}, ", end="")
    print(f"rank {options.rank}\n{HEADER}", flush=True)
    page = settings(name, options, torch.__version__)
    found = print_and_keep(results(options), line, page, options.json)
    return found


def exit_status(found: list[dict[str, Any]]) -> int:
    """1 if anything is wrong that is not a search's finding that a batch is too large."""
    wrong = [result for result in found if "wrong" in result]
    return int(any(not r.get("is_search") or r["wrong"] != OUT_OF_MEMORY for r in wrong))


if __name__ == "__main__":
    sys.exit(exit_status(main()))
