"""Milliseconds per frame of a stream: stock `LMGen`, CUDA graphs on, with and without TTT.

    python benchmarks/streaming.py [--batch 1 8] [--steps 600] [--method in_place] [--write sum]

Moshi 7B with random weights; TTT's parameters are random too, so that it has an effect. No time is
reported unless the state has seen exactly `steps // chunk_size` updates, and unless, on one fixed
stream of all 17 codes, it is with CUDA graphs what it is without them.

Tokens of greedy decoding are compared in float32, on a smaller model of Moshi's structure: in
bfloat16 with random weights stock `moshi`, without TTT, does not repeat its own.

On a machine without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from moshi.models import loaders
from moshi.models.lm import LMGen

from ttt import TTTArgs, TTTLMModel, build_model, eager_streaming, state_bytes, ttt_parameters

SMALL = {"dim": 64, "num_heads": 4, "num_layers": 8, "depformer_dim": 32, "depformer_num_heads": 2,
         "depformer_num_layers": 2, "depformer_dim_feedforward": 128, "context": 100}  # fmt: skip
FLOAT32 = {"dim": 1024, "num_heads": 8, "num_layers": 12, "depformer_num_layers": 2}
"""What is smaller than in Moshi 7B, where tokens are compared; TTT in layers 5 and 11."""
STATE_TOLERANCE = {"sum": 2e-2, "delta": 5e-2}
"""Of ‖with graphs − without‖ / ‖without‖, by write rule: bfloat16 activations, rounded in another
order. `delta` solves a system of equations that is made of them, which enlarges their rounding."""


@dataclass
class Stream:
    tokens: torch.Tensor
    """[B, 9, T]."""
    step_ms: list[float]
    updates: dict[int, int] = field(default_factory=dict)
    """By layer: steps after which the fast weights were others than before."""
    fast_weights: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, at the end."""


def make_model(
    ttt_args: TTTArgs, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> TTTLMModel:
    shape = dict(loaders._lm_kwargs)
    if device.type != "cuda":
        shape |= SMALL
    elif dtype == torch.float32:
        shape |= FLOAT32
    torch.manual_seed(0)
    model = build_model(shape, ttt_args, device=device, dtype=dtype)
    for name, parameter in ttt_parameters(model).items():
        if name.endswith(("target_conv", "out_proj")):
            torch.nn.init.normal_(parameter, std=0.02)
        elif name.endswith("target_gate"):
            parameter.data.fill_(0.1)
    return model.eval().requires_grad_(False)


def run_stream(
    model: TTTLMModel, codes: torch.Tensor, *, graphs: bool, force: bool = False
) -> Stream:
    """Greedy decoding of all frames of the user's part of `codes` [B, 17, T].

    Args:
        force: the model also says what `codes` say, instead of what it prefers.
    """
    own, user = codes[:, : 1 + model.dep_q], codes[:, 1 + model.dep_q :]
    now = [0]

    def force_text(token: torch.Tensor) -> None:
        if force:
            token.copy_(own[:, 0, now[0]])

    generator = LMGen(model, use_sampling=False, on_text_hook=force_text)
    stream = Stream(torch.empty(0), [])
    frames = []
    streaming = generator.streaming if graphs else partial(eager_streaming, generator)
    with streaming(codes.shape[0]):
        for t in range(codes.shape[2]):
            now[0] = t
            replacement = own[:, 1:, t : t + 1] if force else None
            synchronize(codes.device)
            started_at = time.perf_counter()
            frame = generator.step(user[:, :, t : t + 1], replacement)
            synchronize(codes.device)
            stream.step_ms.append(1e3 * (time.perf_counter() - started_at))
            if frame is not None:
                frames.append(frame.clone())
            for index, fast in fast_weights(model).items():
                before = stream.fast_weights.get(index)
                if before is None or not torch.equal(fast, before):
                    stream.fast_weights[index] = fast.clone()
                    stream.updates[index] = stream.updates.get(index, -1) + 1
    stream.tokens = torch.cat(frames, dim=2)
    return stream


def fast_weights(model: TTTLMModel) -> dict[int, torch.Tensor]:
    """Return, by layer, a tensor of the streaming state that changes with every update alone."""
    states = {index: module._streaming_state for index, module in model.ttt_layers.items()}
    return {i: state.fast_weights()[0] for i, state in states.items() if state is not None}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def check_tokens(
    ttt_args: TTTArgs, codes: torch.Tensor, expected: int, device: torch.device
) -> dict[str, float]:
    """The share of tokens that greedy decoding, with the user's part of `codes`, says alike with
    CUDA graphs and without, in float32; leaves the program unless it is all of them, after
    `expected` updates in each."""
    model = make_model(ttt_args, device, torch.float32)
    runs = [run_stream(model, codes, graphs=graphs) for graphs in (True, False)]
    for run in runs:
        check_updates(run, expected)
    equal = (runs[0].tokens == runs[1].tokens).float().mean().item()
    if equal < 1:
        sys.exit(f"wrong: with CUDA graphs {1 - equal:.1%} of the greedy tokens differ")
    different = runs[0].tokens.unique().numel()
    return {"steps": codes.shape[2], "equal": equal, "updates": expected, "vocabulary": different}


def check_updates(stream: Stream, expected: int) -> None:
    if set(stream.updates.values()) != {expected}:
        sys.exit(f"wrong: {stream.updates} updates by layer, instead of {expected}")


def check_state(model: TTTLMModel, codes: torch.Tensor) -> float:
    """The largest relative difference of a layer's fast weights, with CUDA graphs and without, on
    one fixed stream; leaves the program if it is too large."""
    graphed = run_stream(model, codes, graphs=True, force=True).fast_weights
    eager = run_stream(model, codes, graphs=False, force=True).fast_weights
    worst = max(((graphed[i] - eager[i]).norm() / eager[i].norm()).item() for i in eager)
    if not worst < STATE_TOLERANCE[model.ttt_args.write]:
        sys.exit(f"wrong: with CUDA graphs the fast weights differ by {worst:.1e} of their size")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--check-steps", type=int, default=200, help="of the runs whose states are compared"
    )
    parser.add_argument("--method", default="in_place")
    parser.add_argument("--write", default="sum")
    parser.add_argument("--chunk-size", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    ttt_args = TTTArgs(enabled=True, method=options.method)
    if ttt_args.reads("write"):
        ttt_args.write, ttt_args.chunk_size = options.write, options.chunk_size
        ttt_args.target = "text"
    expected = options.steps // ttt_args.update_frames
    warm_up = min(20, options.steps // 4)
    generator = torch.Generator().manual_seed(1)
    codes = {
        batch: torch.randint(0, 2048, (batch, 17, options.steps), generator=generator).to(device)
        for batch in options.batch
    }
    short = codes[options.batch[0]][:, :, : options.check_steps]

    result = check_tokens(ttt_args, codes[options.batch[0]], expected, device)
    print(json.dumps({"machine": name, "greedy tokens in float32": result}), flush=True)

    off_ms: dict[int, float] = {}
    for enabled in (False, True):
        model = make_model(ttt_args if enabled else TTTArgs(), device)
        page = {"machine": name, "method": options.method if enabled else "no TTT"}
        if enabled:
            page["write"] = options.write if ttt_args.reads("write") else None
            page["state_difference_graphs_eager"] = check_state(model, short)
        for batch in options.batch:
            stream = run_stream(model, codes[batch], graphs=True)
            if enabled:
                check_updates(stream, expected)
            step_ms = stream.step_ms[warm_up:]
            result = page | {"batch": batch, "median_ms": median(step_ms), "max_ms": max(step_ms)}
            if enabled:
                result |= {
                    "updates": expected,
                    "ratio": result["median_ms"] / off_ms[batch],
                    "state_gb": state_bytes(model, batch) / 1e9,
                }
            else:
                off_ms[batch] = result["median_ms"]
            print(json.dumps(result), flush=True)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
