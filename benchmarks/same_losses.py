"""Losses of the stock model and ours over twenty optimizer steps of Moshi.

    python benchmarks/same_losses.py --planted --json same_losses.json
    python benchmarks/same_losses.py --model tiny --device cpu --frames 100 --rank 8 --planted

From the same weights, on the same codes: `stock`, and ours with every kind of activation
checkpointing, compiled and not. In bfloat16 no two of them round alike, and what was rounded
otherwise grows from step to step. How much, is measured on the stock model itself: `stock, again`
is the same run once more (on a GPU the order of some sums is not fixed); `stock, otherwise` takes
the rows of a batch one by one, and attention by PyTorch's plain form. A loss may differ from that
of `stock` at the same step by

    max(4 n, L / (2⁸ √N))   in bfloat16,      max(4 n, 1e-5)   in float32

for n, the largest difference that these have shown up to this step, and the mean L of the first
step's N = B T losses: so much does a mean change if each of them is off by half of a last digit, up
or down. Beyond that the exit status is 1.

With `--base-precision` the stock model computes with the same frozen weights in fewer bits, in the
plainest way (`ttt.ops.frozen.reference`); n is also taken from rows one by one alone, and plain
attention alone. Of float8 there is a line more, in which the tensor cores add up in float32 every
few products, and not at the end of a sum alone; and before the first step the losses of single
targets are compared as well (`target_losses.py` says why, and how far apart they may be). The rows
of random weights are all of one size, and so would be their scales: those of the middle layer are
given different sizes.

That an error goes beyond it is shown with `--planted`, by short runs of ours with one in them; if
one does not, the exit status is 1 too.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from moshi.modules.lora import LoRALinear
from outputs import json_file, print_and_keep, settings
from target_losses import Distances
from torch import Tensor
from training_arms import (
    Arm,
    OtherStockRun,
    OurRun,
    PlainAttentionStockRun,
    RowByRowStockRun,
    StockRun,
    Weights,
    random_codes,
)

from finetune.step import chunked_loss
from ttt import TTTLMModel
from ttt.layers import execution
from ttt.layers.execution import Checkpointing
from ttt.layers.frozen import FrozenLinear, frozen_linears
from ttt.ops.frozen import KINDS, float8

FACTOR = 4.0
"""Of n: two runs are a small sample of what rounding does."""
FLOAT32_BOUND = 1e-5
PLANTED_STEPS = 8
"""An error shows early or never: later on n is larger."""


class Run(NamedTuple):
    """A line of the table."""

    name: str
    arm: Arm
    make: Callable[..., Any] = OurRun
    change: Callable[[TTTLMModel], None] | None = None
    """What an error does to the model."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_planted(self) -> bool:
        return self.name.startswith("planted")


def runs(options: argparse.Namespace) -> Iterator[Run]:
    base = options.base_precision
    stock = Arm("", is_stock=True, is_full=options.full, compile=False, base=base)
    yield Run("stock", stock, StockRun)
    yield Run("stock, again", stock, StockRun)
    yield Run("stock, otherwise", stock, OtherStockRun)
    if base != "bfloat16":
        # A number that falls into another step of e4m3 changes much: two runs say too little.
        yield Run("stock, row by row", stock, RowByRowStockRun)
        yield Run("stock, plain attention", stock, PlainAttentionStockRun)
    for compile in (False, True) if options.compile else (False,):
        for mode in (True, "selective", False):
            arm = Arm("", is_full=options.full, checkpointing=mode, compile=compile, base=base)
            yield Run(name_of(compile, mode), arm)
    if options.planted:
        eager = Arm("", is_full=options.full, compile=False, base=base)
        yield Run("planted: a layer learns nothing", eager, change=lose_gradients)
        if not options.full:
            yield Run("planted: LoRA's scale 2.2", eager, change=change_scale)
            if options.dtype == torch.bfloat16 and base == "bfloat16":
                kept = Arm("", compile=True, base=base)
                yield Run("planted: digits kept", kept, within=kept_digits)
        if base != "bfloat16":
            yield Run("planted: scales turned round", eager, change=turn_scales)
            yield Run("planted: a block without its scale", eager, change=lose_scale)
    if base == "float8":
        yield Run("ours, eager, sums in 32 bits", replace(stock, is_stock=False), within=full_sums)


def name_of(compile: bool, mode: Checkpointing) -> str:
    return f"ours, {'compiled' if compile else 'eager'}, checkpointing {mode}".lower()


NAMES = [name_of(compile, mode) for compile in (False, True) for mode in (True, "selective", False)]


def chosen_runs(options: argparse.Namespace) -> Iterator[Run]:
    """Yield the stock model's runs, those of ours that `--arms` names, and the planted errors."""
    for run in runs(options):
        if not options.arms or run.name not in NAMES or run.name in options.arms:
            yield run


# Errors to be found -------------------------------------------------------------------------------


def lose_gradients(model: TTTLMModel) -> None:
    """Lose the gradients of one layer of the main transformer."""
    model.transformer.layers[len(model.transformer.layers) // 2].requires_grad_(False)


def change_scale(model: TTTLMModel) -> None:
    """Change the scale of what LoRA adds to 2 everywhere."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.scaling *= 1.1


def turn_scales(model: TTTLMModel) -> None:
    """Give the rows, or blocks, of one frozen weight each other's scales."""
    layer = middle_frozen(model)
    layer.scales = layer.scales.flip(0)


def lose_scale(model: TTTLMModel) -> None:
    """Lose the scale of one of 64 blocks, or rows, of one frozen weight."""
    layer = middle_frozen(model)
    layer.scales = layer.scales.clone()
    layer.scales[::64] = 1.0


def middle_frozen(model: TTTLMModel) -> FrozenLinear:
    """Return the projection of the middle layer's MLP."""
    layers = model.transformer.layers
    _, last = list(frozen_linears(layers[len(layers) // 2]))[-1]
    return last


@contextmanager
def kept_digits() -> Iterator[None]:
    """Compiled code that rounds where inductor would have it; see `ttt.layers.execution`."""

    def forget() -> None:
        execution._compiled.cache_clear()
        chunked_loss._loss.cache_clear()
        torch._dynamo.reset()

    rounding = execution.ROUNDING
    forget()
    # An option that is on anyway, in its place.
    execution.ROUNDING = "size_asserts"
    try:
        yield
    finally:
        execution.ROUNDING = rounding
        forget()


@contextmanager
def full_sums() -> Iterator[None]:
    """Sums of products in 8 bits as they are without `use_fast_accum`; on a CPU they always are."""
    usual = float8.FAST_SUMS
    float8.FAST_SUMS = False
    try:
        yield
    finally:
        float8.FAST_SUMS = usual


# Running and judging ------------------------------------------------------------------------------


def losses_of(
    run: Run, weights: Weights, options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the losses of every step, and of a base in float8 those of single targets before."""
    is_cuda = options.device == "cuda"
    with run.within():
        model = weights.stock(run.arm) if run.arm.is_stock else weights.ours(run.arm)
        if run.change is not None:
            assert isinstance(model, TTTLMModel)
            run.change(model)
        steps = min(options.steps, PLANTED_STEPS) if run.is_planted else options.steps
        training, codes = run.make(model, options), random_codes(options.batch, run.arm, options)
        # Only a base in float8 needs it.
        before = training.target_losses(codes) if run.arm.base == "float8" else None
        started = time.monotonic()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        losses = [training.step(codes) for _ in range(steps)]
    peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if is_cuda else {}
    return {"losses": losses, "total_sec": time.monotonic() - started, **peak}, before


def bounds_of(
    stock: list[float], others: list[list[float]], options: argparse.Namespace
) -> list[float]:
    """Return how far a loss may be from the stock model's at each step."""
    apart = [
        max(abs(loss - expected) for loss in at_step)
        for expected, *at_step in zip(stock, *others, strict=True)
    ]
    least = FLOAT32_BOUND
    if options.dtype == torch.bfloat16:
        least = stock[0] / (2**8 * math.sqrt(options.batch * options.frames))
    return [max(FACTOR * n, least) for n in accumulate(apart, max)]


def judged(result: dict[str, Any], stock: list[float], bounds: list[float]) -> dict[str, Any]:
    """Return a verdict with the largest difference, and the step at which it is largest against the
    bound."""
    found = list(zip(result["losses"], stock, bounds, strict=False))
    shares = [abs(loss - expected) / bound for loss, expected, bound in found]
    worst = max(range(len(shares)), key=lambda step: shares[step])
    # Also of losses that are no numbers.
    is_beyond = not all(share <= 1 for share in shares)
    return {
        **result,
        "difference": max(abs(loss - expected) for loss, expected, _ in found),
        "share_of_bound": shares[worst],
        "at_step": worst + 1,
        "is_beyond": is_beyond,
    }


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    weights = Weights(options)
    stock: list[list[float]] = []
    bounds: list[float] = []
    distances = Distances()
    for run in chosen_runs(options):
        try:
            result, before = losses_of(run, weights, options)
        except torch.OutOfMemoryError:
            yield {"name": run.name, "wrong": "out of memory"}
            if run.arm.is_stock:
                return
            continue
        finally:
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
        if before is not None:
            far = distances.add_stock(before) if run.arm.is_stock else distances.of(before)
            result["target_distance"] = far
        if run.arm.is_stock:
            stock.append(result["losses"])
            if not all(map(math.isfinite, result["losses"])):
                yield {"name": run.name, **result, "wrong": "losses are not finite"}
                return
            bounds = bounds_of(stock[0], stock[1:], options) if len(stock) > 2 else []
        else:
            result = judged(result, stock[0], bounds)
            if "target_distance" in result:
                share = distances.share_of_bound(result["target_distance"])
                result["target_share_of_bound"] = share
                result["is_beyond"] |= not share <= 1
            if result["is_beyond"] != run.is_planted:
                result["wrong"] = "not found" if run.is_planted else "beyond the bound"
        yield {"name": run.name, "bounds": bounds, **result}


# Showing ------------------------------------------------------------------------------------------

HEADER = (
    f"{'':<40}{'first':>9}{'last':>9}{'differs':>9}{'of bound':>10}{'at step':>9}{'s':>7}"
    "  targets before, of their bound"
)


def line(result: dict[str, Any]) -> str:
    text = f"{result['name']:<40}"
    if "losses" in result:
        text += f"{result['losses'][0]:>9.4f}{result['losses'][-1]:>9.4f}"
    if "difference" in result:
        text += f"{result['difference']:>9.1e}{result['share_of_bound']:>10.2f}"
        text += f"{result['at_step']:>9}{result['total_sec']:>7.0f}"
    if "target_distance" in result:
        text += f"  {result['target_distance']:.1e}"
    if "target_share_of_bound" in result:
        text += f" {result['target_share_of_bound']:.2f}"
    return text + (f"  {result['wrong'].upper()}" if "wrong" in result else "")


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Every step: the stock model's losses, what they may differ by, and what the others do."""
    stock, *others = [result for result in found if "losses" in result]
    bounds = found[-1].get("bounds")
    if not bounds:
        return
    yield f"\n{'step':>4}{'stock':>10}{'bound':>9}  differences, in the order of the lines above"
    for step, (expected, bound) in enumerate(zip(stock["losses"], bounds, strict=True)):
        apart = [abs(o["losses"][step] - expected) for o in others if step < len(o["losses"])]
        yield f"{step + 1:>4}{expected:>10.4f}{bound:>9.1e}  " + "".join(
            f"{d:>8.1e}" for d in apart
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="7b", choices=["7b", "tiny"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=625)
    parser.add_argument("--rank", type=int, default=128, help="of LoRA")
    parser.add_argument(
        "--base-precision", default="bfloat16", choices=["bfloat16", *KINDS], help="with LoRA"
    )
    parser.add_argument("--full", action="store_true", help="all weights train, and no LoRA")
    parser.add_argument("--full-layers", type=int, default=8, help="of 32, in full fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--arms", nargs="+", choices=NAMES, help="lines of ours; default: all")
    parser.add_argument("--planted", action="store_true", help="errors that must be found")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    options.frees_base = False
    options.varied_rows = options.base_precision != "bfloat16"
    if options.full and options.base_precision != "bfloat16":
        parser.error("--full: weights that train are not kept in fewer bits")
    # On a CPU compiled code always keeps digits.
    options.compile = options.device == "cuda" or options.dtype == torch.float32
    # The learning rate is at its highest from the second step on.
    options.schedule_steps = max(20, options.steps)
    options.ttt_layers = {}
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    kind = (
        f"all weights of {options.full_layers} layers" if options.full else f"rank {options.rank}"
    )
    print(f"{name}, torch {torch.__version__}, {options.dtype}, B {options.batch}, ", end="")
    print(f"T {options.frames}, {kind}, lr {options.lr:g}\n{HEADER}", flush=True)
    page = settings(name, options, torch.__version__)
    found = print_and_keep(results(options), line, page, options.json)
    print("\n".join(table(found)))
    return found


def exit_status(found: list[dict[str, Any]]) -> int:
    return int(any("wrong" in result for result in found))


if __name__ == "__main__":
    sys.exit(exit_status(main()))
