"""Time and memory of the operators, and of plain forms of them, against what they add to.

    python benchmarks/ops.py --json ops.json
    python benchmarks/ops.py --device cpu --dtype float32 --width 32 --hidden 88 --chunk-size 8 \\
        --sizes 2x50 --repeats 1

The baseline is the stock projection o = W0 z, forward and backward to z and W0. Every other line of
In-Place TTT contains that projection too, and the backward pass to v (and β). TTT-Linear and
TTT-MLP are compared with a plain scan over mini-batches, which keeps everything for the backward
pass; attention in a window with attention to all frames, and with a mask of all pairs. Values and
gradients are compared with a float32 (on a CPU float64) run before anything is timed; what differs
is reported as wrong, without a time. Times are medians. Memory is the peak above the inputs, the
gradient of the output among them, of forward and backward together. `--profile` lists what the time
of a method goes into, forward and backward together.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from outputs import json_file, print_and_keep, settings
from torch import Tensor

from ttt import ops
from ttt.ops.inner_loop import ttt_linear_mlp
from ttt.ops.moshi.attention import causal_attention

SIZES = ["1x1250", "16x1250", "4x2048", "1x8192", "1x24000"]
BETA = 10.0
LAG_FRAMES = 1
"""As with the default conv of two frames."""
HEAD_WIDTH = 128
MINI_BATCH_FRAMES = 16
MAX_SCAN_FRAMES = 2048
WINDOWS = [600, 300, 100]
PROFILE_LINES = 40


@dataclass
class Case:
    """Something to measure: `run(*inputs, *weights)`, and what it has to be equal to."""

    name: str
    inputs: list[Tensor]
    """With a batch dimension."""
    weights: list[Tensor]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]


def in_place_cases(batch: int, num_frames: int, options: argparse.Namespace) -> list[Case]:
    """The projection, with and without In-Place TTT. TTT's part is about as large as the rest."""
    generator = torch.Generator().manual_seed(0)
    chunk_size = options.chunk_size
    lr = (num_frames * options.hidden) ** -0.5

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(*shape, generator=generator)
        return x.to(options.device, options.dtype).requires_grad_()

    z = normal(batch, num_frames, options.hidden)
    v = normal(batch, num_frames, options.width)
    weight = normal(options.width, options.hidden, scale=options.hidden**-0.5)
    beta = torch.full((1,), BETA, device=options.device).requires_grad_()

    def with_sum(z: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return F.linear(z, weight) + ops.in_place_ttt(z, v, lr=lr, chunk_size=chunk_size)

    def with_delta(z: Tensor, v: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        learned = ops.in_place_delta(z, v, beta=beta, chunk_size=chunk_size, lag=LAG_FRAMES)
        return F.linear(z, weight) + learned

    def materialized(dtype: torch.dtype) -> Callable[..., Tensor]:
        def run(z: Tensor, v: Tensor, weight: Tensor) -> Tensor:
            out = materialize_sum(z.to(dtype), v.to(dtype), weight.to(dtype), lr, chunk_size)
            return out.to(z.dtype)

        return run

    def reference_sum(z: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return materialize_sum(z, v, weight, lr, chunk_size)

    def reference_delta(z: Tensor, v: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return materialize_delta(z, v, weight, beta, chunk_size)

    return [
        Case("projection", [z], [weight], F.linear, F.linear),
        Case("sum", [z, v], [weight], with_sum, reference_sum),
        Case("delta", [z, v], [weight, beta], with_delta, reference_delta),
        Case("sum, bf16 weights", [z, v], [weight], materialized(torch.bfloat16), reference_sum),
        Case("sum, fp32 weights", [z, v], [weight], materialized(torch.float32), reference_sum),
    ]


def materialize_sum(z: Tensor, v: Tensor, weight: Tensor, lr: float, chunk_size: int) -> Tensor:
    """The rule as it is written: a weight [B, d, h] for every chunk."""
    outputs = []
    weights = weight.expand(len(z), -1, -1)
    for z_i, v_i in zip(z.split(chunk_size, 1), v.split(chunk_size, 1), strict=True):
        outputs.append(z_i @ weights.mT)
        weights = weights + lr * (v_i.mT @ z_i)
    return torch.cat(outputs, dim=1)


def materialize_delta(
    z: Tensor, v: Tensor, weight: Tensor, beta: Tensor, chunk_size: int
) -> Tensor:
    """The rule as it is written."""
    outputs = []
    state = torch.zeros_like(weight).expand(len(z), -1, -1)
    for start in range(0, z.shape[1], chunk_size):
        z_i, end = z[:, start : start + chunk_size], start + chunk_size
        outputs.append(z_i @ (weight + state).mT)
        if end <= z.shape[1]:
            first = max(start, LAG_FRAMES)
            keys = z[:, first - LAG_FRAMES : end - LAG_FRAMES]
            eye = torch.eye(keys.shape[1], dtype=z.dtype, device=z.device)
            strength = keys.square().sum(2).mean(1)[:, None, None] / beta
            residual = v[:, first:end] - keys @ state.mT
            errors = torch.linalg.solve(keys @ keys.mT + strength * eye, residual)
            state = state + errors.mT @ keys
    return torch.cat(outputs, dim=1)


def linear_cases(batch: int, num_frames: int, options: argparse.Namespace) -> list[Case]:
    """TTT-Linear as a plain scan that keeps everything, and as it is trained."""
    return scan_cases("linear", ops.ttt_linear, [1], batch, num_frames, options)


def mlp_cases(batch: int, num_frames: int, options: argparse.Namespace) -> list[Case]:
    """Return the cases for TTT-MLP."""
    return scan_cases("mlp", ops.ttt_mlp, [1, 4], batch, num_frames, options)


def scan_cases(
    name: str,
    op: Callable[..., tuple[Tensor, Any]],
    widths: list[int],
    batch: int,
    num_frames: int,
    options: argparse.Namespace,
) -> list[Case]:
    """Heads of `HEAD_WIDTH`; `widths` are those of the inner layers' inputs, in heads."""
    if num_frames > MAX_SCAN_FRAMES:
        return []
    generator = torch.Generator().manual_seed(0)
    heads = max(1, options.width // HEAD_WIDTH)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = scale * torch.randn(*shape, generator=generator)
        return x.to(options.device, options.dtype).requires_grad_()

    inputs = [normal(batch, heads, num_frames, HEAD_WIDTH) for _ in range(3)]
    inputs.append((0.01 * torch.rand(batch, heads, num_frames)).to(inputs[0]).requires_grad_())
    weights = []
    for width, next_width in zip(widths, [*widths[1:], 1], strict=True):
        shape = (heads, width * HEAD_WIDTH, next_width * HEAD_WIDTH)
        weights += [normal(*shape, scale=0.02), normal(heads, shape[2], scale=0.02)]
    weights += [normal(heads, HEAD_WIDTH), normal(heads, HEAD_WIDTH)]
    scale = 1 / torch.arange(1, MINI_BATCH_FRAMES + 1, device=options.device)

    def trained(group_size: int | None) -> Callable[..., Tensor]:
        return lambda *args: op(*args, token_scale=scale, scan_checkpoint_group_size=group_size)[0]

    def plain(*args: Tensor) -> Tensor:
        # Without the kernels that CUDA devices have for it.
        with patch.object(ttt_linear_mlp, "has_kernel", return_value=False):
            return op(*args, token_scale=scale)[0]

    return [
        Case(f"{name}, plain scan", inputs, weights, plain, plain),
        # As with `gradient_checkpointing: true`, and with less memory.
        Case(name, inputs, weights, trained(None), plain),
        Case(f"{name}, groups of 16", inputs, weights, trained(16), plain),
    ]


def attention_cases(batch: int, num_frames: int, options: argparse.Namespace) -> list[Case]:
    """A layer's causal attention: to all frames, and in windows, with the mask that stock has."""
    if num_frames > MAX_SCAN_FRAMES:
        return []
    generator = torch.Generator().manual_seed(0)
    shape = batch, num_frames, max(1, options.width // HEAD_WIDTH), HEAD_WIDTH
    inputs = [
        torch.randn(shape, generator=generator).to(options.device, options.dtype).requires_grad_()
        for _ in "qkv"
    ]

    def windowed(window: int) -> Callable[..., Tensor]:
        return lambda q, k, v: causal_attention(q, k, v, window)

    def masked(window: int) -> Callable[..., Tensor]:
        frames = torch.arange(num_frames, device=options.device)
        distance = frames[:, None] - frames
        visible = (distance >= 0) & (distance < window)

        def run(*qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)

        return run

    cases = [Case("attention", inputs, [], windowed(num_frames), masked(num_frames))]
    for window in options.windows:
        if window < num_frames:
            cases.append(Case(f"window {window}", inputs, [], windowed(window), masked(window)))
            cases.append(Case(f"masked {window}", inputs, [], masked(window), masked(window)))
    return cases


CASES = [in_place_cases, linear_cases, mlp_cases, attention_cases]


def difference(case: Case, d_out: Tensor, options: argparse.Namespace) -> float:
    """The largest relative error (in norm) of the output and of the gradients of the inputs, over
    the first row and the last."""
    exact = torch.float64 if options.device == "cpu" else torch.float32
    out = case.run(*case.inputs, *case.weights)
    grads = torch.autograd.grad(out, case.inputs, d_out)
    worst = 0.0
    for row in sorted({0, len(d_out) - 1}):
        here = slice(row, row + 1)
        inputs = [x[here].detach().to(exact).requires_grad_() for x in case.inputs]
        expected = case.reference(*inputs, *[w.detach().to(exact) for w in case.weights])
        d_expected = torch.autograd.grad(expected, inputs, d_out[here].to(exact))
        for a, b in zip((out, *grads), (expected, *d_expected), strict=True):
            worst = max(worst, ((a[here].to(exact) - b).norm() / b.norm()).item())
    return worst


def measure(case: Case, d_out: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Median times in ms and peak memory in GB, or why there are none."""
    error = difference(case, d_out, options)
    tolerance = 2e-2 if options.dtype == torch.bfloat16 else 1e-4
    if not error < tolerance:
        return {"error": error, "wrong": f"differs from the reference by {error:.1e}"}

    def forward() -> None:
        with torch.no_grad():
            case.run(*case.inputs, *case.weights)

    def forward_backward() -> None:
        out = case.run(*case.inputs, *case.weights)
        torch.autograd.grad(out, [*case.inputs, *case.weights], d_out)

    result: dict[str, Any] = {"error": error}
    result["forward_ms"] = median_ms(forward, options)
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    result["forward_backward_ms"] = median_ms(forward_backward, options)
    if options.device == "cuda":
        result["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    if case.name in options.profile:
        result["profile"] = profile(forward_backward, options)
    return result


def profile(run: Callable[[], None], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time in ms and number of calls in one run of each kernel, on a CPU of each operator."""
    kinds = [getattr(torch.profiler.ProfilerActivity, options.device.upper())]
    time_total = f"self_{'cpu' if options.device == 'cpu' else 'device'}_time_total"
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(options.repeats):
            run()
        if options.device == "cuda":
            torch.cuda.synchronize()
    rows = [
        {
            "name": event.key,
            "ms": getattr(event, time_total) / 1e3 / options.repeats,
            "calls": event.count / options.repeats,
        }
        for event in recorded.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def median_ms(run: Callable[[], None], options: argparse.Namespace) -> float:
    times = []
    for i in range(options.warmup + options.repeats):
        if options.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            run()
            elapsed = 1000 * (time.perf_counter() - begin)
        if i >= options.warmup:
            times.append(elapsed)
    return statistics.median(times)


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for size in options.sizes:
        batch, num_frames = map(int, size.split("x"))
        for make in CASES:
            cases = make(batch, num_frames, options)
            if options.methods and not any(case.name in options.methods for case in cases):
                continue
            baseline: dict[str, Any] = {}
            for case in cases:
                if case is not cases[0] and options.methods and case.name not in options.methods:
                    continue
                with torch.no_grad():
                    d_out = torch.randn_like(case.run(*case.inputs, *case.weights))
                try:
                    result = measure(case, d_out, options)
                except torch.OutOfMemoryError:
                    result = {"wrong": "out of memory"}
                baseline = baseline or result
                for key in ("forward_ms", "forward_backward_ms", "peak_gb"):
                    if key in result and baseline.get(key):
                        result[f"{key.rsplit('_', 1)[0]}_ratio"] = result[key] / baseline[key]
                yield {"size": size, "method": case.name, **result}
                if options.device == "cuda":
                    torch.cuda.empty_cache()


HEADER = (
    f"{'B x T':<10}{'method':<20}{'forward':>14}{'':7}{'with backward':>14}{'':7}{'peak':>10}"
    f"{'':7}{'error':>9}"
)


def line(result: dict[str, Any]) -> str:
    text = f"{result['size']:<10}{result['method']:<20}"
    if "wrong" in result:
        return f"{text}  {result['wrong']}"
    for key, unit, width in (("forward", "ms", 14), ("forward_backward", "ms", 14)):
        text += f"{result[f'{key}_{unit}']:>{width - 3}.2f} ms {result[f'{key}_ratio']:>5.2f}x"
    if "peak_gb" in result:
        text += f"{result['peak_gb']:>7.2f} GB {result['peak_ratio']:>5.2f}x"
    else:
        text += f"{'':17}"
    text += f"{result['error']:>9.0e}"
    for row in result.get("profile", [])[:PROFILE_LINES]:
        text += f"\n{row['ms']:>12.3f} ms {row['calls']:>7.1f} calls  {row['name'][:100]}"
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="batch x frames")
    parser.add_argument("--methods", nargs="+", help="names of lines, the first of a kind always")
    parser.add_argument("--width", type=int, default=4096, help="d")
    parser.add_argument("--hidden", type=int, default=11264, help="h")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS, help="of attention")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", nargs="+", default=[], help="methods whose kernels are listed")
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    options.dtype = getattr(torch, options.dtype)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, d {options.width}, ", end="")
    print(f"h {options.hidden}, C {options.chunk_size}\n{HEADER}", flush=True)
    page = settings(name, options, torch.__version__)
    return print_and_keep(results(options), line, page, options.json)


if __name__ == "__main__":
    main()
