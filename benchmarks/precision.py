"""Precision of In-Place TTT's `delta` in bfloat16 and float32: the tables of docs/numerics.md.

    python benchmarks/precision.py [--device cpu] [--tables values gradients models strength]

values: outputs, chunk by chunk, relative to the targets. gradients: outputs and gradients of random
sums of them, on keys that differ much, little, and not at all. models: logits of a small Moshi in
one parallel pass, as a stream, and in float32. strength: outputs of the last chunk for β up to
100,000. Chunks have 256 frames; `values` and `strength` are without a lag.

An error is ‖computed − exact‖ / ‖exact‖. *Exact* is the same operator in float64 on the same device
and on the same inputs, which are rounded to bfloat16 first: so it is the error of the arithmetic,
not that of the inputs. Before anything is measured, float64 is compared with the definition, frame
by frame on the CPU, values and gradients. All random numbers are drawn on the CPU: every device
reads the same inputs and weights. Float32 is computed without TF32.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

# Norms that are compiled round otherwise than those that are not.
os.environ["NO_TORCH_COMPILE"] = "1"

import torch
from outputs import json_file, print_and_keep, settings
from precision_models import (
    FULL_MODEL,
    PRECISIONS,
    TARGETS,
    TINY_MODEL,
    ModelSizes,
    distance,
    measure_models,
    name,
)
from torch import Tensor

from ttt import ops

NUM_WORDS = 256
"""Different frames, which are drawn again and again."""
WORD_NOISE = 0.02
SILENCE_NOISE = 1e-3
SILENT_FRAMES = 40
"""At a time, with `half silent`."""
VALUES = [(0.0, 10.0), (0.94, 10.0), (0.99, 10.0), (0.94, 100.0)]
"""Cosine of two keys, and β."""
KINDS = [*(f"cosine {cosine}" for cosine in ("0", "0.9", "0.94", "0.99"))]
KINDS += ["one frame repeated", "silence", "half silent"]
STRENGTHS = [10, 100, 300, 1000, 3000, 10_000, 100_000]
GRADIENTS = [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float32, 1)]
"""Precision, and lag."""
DIFFERENCE_OF_FLOAT64 = 1e-8
"""Allowed of float64 against the definition."""


@dataclass(frozen=True)
class Shape:
    """Shape of an operator's inputs."""

    num_frames: int
    hidden: int
    width: int


@dataclass(frozen=True)
class Sizes:
    """What the tables are measured on."""

    chunk: int
    values: Shape
    gradients: Shape
    strength: Shape
    models: ModelSizes


FULL = Sizes(256, Shape(2048, 1024, 32), Shape(1100, 512, 32), Shape(2048, 512, 16), FULL_MODEL)
TINY = Sizes(32, Shape(128, 128, 8), Shape(112, 128, 8), Shape(128, 128, 8), TINY_MODEL)
"""Of `--tiny`: to see that the program works."""


# Inputs -------------------------------------------------------------------------------------------


def pairs(kind: str, shape: Shape, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return keys [1, T, h] and targets [1, T, d] in bfloat16, on the CPU.

    Args:
        kind: one of `KINDS`, or another cosine.
    """

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    words = torch.randint(0, NUM_WORDS, (1, shape.num_frames), generator=random)
    noise, common = normal(1, shape.num_frames, shape.hidden), normal(shape.hidden)
    silence = common + SILENCE_NOISE * noise
    if kind == "one frame repeated":
        keys = common.expand_as(noise)
    elif kind == "silence":
        keys = silence
    elif kind == "half silent":
        is_silent = torch.arange(shape.num_frames) // SILENT_FRAMES % 2 == 0
        keys = torch.where(is_silent[None, :, None], silence, noise)
    else:
        cosine = float(kind.removeprefix("cosine "))
        own = normal(NUM_WORDS, shape.hidden)
        keys = (cosine**0.5 * common + (1 - cosine) ** 0.5 * own)[words] + WORD_NOISE * noise
    return keys.bfloat16(), normal(NUM_WORDS, shape.width)[words].bfloat16()


# The tables ---------------------------------------------------------------------------------------


def check_float64(device: torch.device) -> None:
    """Leave the program unless float64 on the device equals the definition on the CPU."""
    random = torch.Generator().manual_seed(0)
    z, v = pairs("cosine 0.94", Shape(45, 24, 8), random)
    d_out = torch.randn(v.shape, generator=random)
    found = []
    for op, place in ((ops.in_place_delta, device), (ops.reference.in_place_delta, "cpu")):
        found.append(with_gradients(op, z, v, d_out, 10.0, torch.float64, place, 8, lag=1))
    worst = max(distance(a, b) for a, b in zip(*found, strict=True))
    if not worst < DIFFERENCE_OF_FLOAT64:
        sys.exit(f"wrong: float64 on {device} differs from the definition by {worst:.1e}")


def with_gradients(
    op: Callable[..., Tensor],
    z: Tensor,
    v: Tensor,
    d_out: Tensor,
    beta: float,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_size: int,
    *,
    lag: int,
) -> list[Tensor]:
    """Return the output and the gradients of z, v and β, in float64 on the CPU."""
    strength = torch.tensor(beta, dtype=torch.promote_types(dtype, torch.float32), device=device)
    inputs = [x.to(device, dtype).requires_grad_() for x in (z, v)]
    strength.requires_grad_()
    out = op(*inputs, beta=strength, chunk_size=chunk_size, lag=lag)
    grads = torch.autograd.grad(out, [*inputs, strength], d_out.to(device, dtype))
    return [x.detach().cpu().double() for x in (out, *grads)]


@torch.no_grad()
def learned(
    z: Tensor, v: Tensor, beta: float, dtype: torch.dtype, device: torch.device, chunk_size: int
) -> Tensor:
    """Return what the fast weights add, [T, d], in float64 on the CPU."""
    inputs = [x.to(device, dtype) for x in (z, v)]
    return ops.in_place_delta(*inputs, beta=beta, chunk_size=chunk_size)[0].cpu().double()


def measure_values(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield errors of outputs relative to the targets, of all chunks that read anything."""
    random, chunk = torch.Generator().manual_seed(0), sizes.chunk
    for cosine, beta in VALUES:
        z, v = pairs(f"cosine {cosine}", sizes.values, random)
        compute = partial(learned, z, v, beta, device=device, chunk_size=chunk)
        exact = compute(torch.float64)
        result: dict[str, Any] = {"cosine": cosine, "beta": beta}
        for dtype in PRECISIONS:
            errors = (compute(dtype) - exact).split(chunk)[1:]
            targets = v[0].double().split(chunk)[1:]
            result[name(dtype)] = [
                (error.norm() / target.norm()).item()
                for error, target in zip(errors, targets, strict=True)
            ]
        yield result


def measure_gradients(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield errors of the output and of the gradients of z, v and β, by kind of keys and β."""
    random = torch.Generator().manual_seed(0)
    for kind in KINDS:
        z, v = pairs(kind, sizes.gradients, random)
        d_out = torch.randn(v.shape, generator=random).bfloat16()
        for beta in (1.0, 10.0, 100.0):
            compute = partial(
                with_gradients,
                *(ops.in_place_delta, z, v, d_out, beta),
                device=device,
                chunk_size=sizes.chunk,
            )
            exact = {lag: compute(torch.float64, lag=lag) for lag in (0, 1)}
            result: dict[str, Any] = {"keys": kind, "beta": beta}
            result["exact gradient of beta"] = [exact[lag][-1].item() for lag in (0, 1)]
            for dtype, lag in GRADIENTS:
                found = zip(compute(dtype, lag=lag), exact[lag], strict=True)
                result[f"{name(dtype)}, lag {lag}"] = [distance(*both) for both in found]
            yield result


def measure_strength(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield errors of the last chunk's outputs, by β."""
    random, chunk = torch.Generator().manual_seed(0), sizes.chunk
    inputs = {kind: pairs(kind, sizes.strength, random) for kind in ("cosine 0.94", "silence")}
    for beta in STRENGTHS:
        result: dict[str, Any] = {"beta": beta}
        for kind, (z, v) in inputs.items():
            compute = partial(learned, z, v, float(beta), device=device, chunk_size=chunk)
            exact = compute(torch.float64)[-chunk:]
            for dtype in PRECISIONS:
                result[f"{kind}, {name(dtype)}"] = distance(compute(dtype)[-chunk:], exact)
        yield result


# The command --------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Return two digits of a number: 1.2e-3."""
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent or 0) else mantissa


def values_cells(result: dict[str, Any]) -> list[str]:
    errors = [result[precision] for precision in ("bfloat16", "float32")]
    shown = [f"{number(by_chunk[0])}, {number(by_chunk[-1])}" for by_chunk in errors]
    return [f"{result['cosine']:g}", f"{result['beta']:g}", *shown]


def gradients_cells(result: dict[str, Any]) -> list[str]:
    errors = [result[f"{name(dtype)}, lag {lag}"] for dtype, lag in GRADIENTS]
    return [result["keys"], f"{result['beta']:g}", *(", ".join(map(number, e)) for e in errors)]


def models_cells(result: dict[str, Any]) -> list[str]:
    cells = [f"`{result['write']}`: {result['compared']}"]
    for found in (result[target] for target in TARGETS):
        same = found.get("same_best_token")
        cells += [number(found["distance"]), "" if same is None else f"{same:.2f}"]
    return cells


def strength_cells(result: dict[str, Any]) -> list[str]:
    return [f"{result['beta']:,}", *(number(x) for key, x in result.items() if "," in key)]


MODEL_COLUMNS = ["differ by", "same best token"]


@dataclass(frozen=True)
class Table:
    """How a table is measured and shown."""

    columns: list[str]
    measure: Callable[[Sizes, torch.device], Iterator[dict[str, Any]]]
    cells: Callable[[dict[str, Any]], list[str]]

    def header(self) -> str:
        return f"\n| {' | '.join(self.columns)} |\n|{' --- |' * len(self.columns)}"


TABLES = {
    "values": Table(
        ["cosine of two keys", "β", "bfloat16: first chunk, last", "float32: first, last"],
        measure_values,
        values_cells,
    ),
    "gradients": Table(
        ["keys", "β"]
        + [f"{name(dtype)}, lag {lag}: output, dz, dv, dβ" for dtype, lag in GRADIENTS],
        measure_gradients,
        gradients_cells,
    ),
    "models": Table(
        ["", *(f"target `{target}`: {what}" for target in TARGETS for what in MODEL_COLUMNS)],
        lambda sizes, device: measure_models(sizes.models, device),
        models_cells,
    ),
    "strength": Table(
        ["β", "0.94, float32", "0.94, bfloat16", "silence, float32", "silence, bfloat16"],
        measure_strength,
        strength_cells,
    ),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=[*TABLES], choices=TABLES)
    parser.add_argument("--tiny", action="store_true", help="small shapes: seconds on a CPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=json_file, help="a file to write the results to")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: choose --device cpu")
    return options


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the tables, and print each table's header before its first."""
    device = torch.device(options.device)
    for chosen in options.tables:
        table = TABLES[chosen]
        print(table.header())
        for result in table.measure(TINY if options.tiny else FULL, device):
            yield {"table": chosen, **result}


def line(result: dict[str, Any]) -> str:
    return f"| {' | '.join(TABLES[result['table']].cells(result))} |"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    torch.set_float32_matmul_precision("highest")
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    started = time.monotonic()
    print(f"{machine}, torch {torch.__version__}, float32 without TF32", flush=True)
    check_float64(torch.device(options.device))
    page = settings(machine, options, torch.__version__)
    found = print_and_keep(results(options), line, page, options.json)
    print(f"\n{time.monotonic() - started:.0f} s")
    return found


if __name__ == "__main__":
    main()
