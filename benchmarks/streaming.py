"""Milliseconds per frame of a stream: stock `LMGen`, CUDA graphs on, with and without TTT.

    python benchmarks/streaming.py [--batch 1 8] [--steps 600] [--method in_place] [--write sum]

Moshi 7B with random weights; TTT's parameters are random too, so that it has an effect. Before any
time is reported: the tokens with CUDA graphs must be those without, under greedy decoding and one
fixed user stream, and the state must have seen exactly `steps // chunk_size` updates. On a machine
without a GPU it runs a small model, to see that it works; those times mean nothing.
"""

import argparse
import gc
import json
import sys
import time
from contextlib import nullcontext

import torch
from moshi.models import loaders
from moshi.models.lm import LMGen
from moshi.utils.compile import no_cuda_graph

from ttt import TTTArgs, TTTLMModel, build_model, state_bytes, ttt_parameters

SMALL = {"dim": 64, "num_heads": 4, "num_layers": 8, "depformer_dim": 32, "depformer_num_heads": 2,
         "depformer_num_layers": 2, "depformer_dim_feedforward": 128, "context": 100}  # fmt: skip


def make_model(ttt_args: TTTArgs, device: torch.device) -> TTTLMModel:
    shape = dict(loaders._lm_kwargs) if device.type == "cuda" else loaders._lm_kwargs | SMALL
    torch.manual_seed(0)
    model = build_model(shape, ttt_args, device=device, dtype=torch.bfloat16)
    for name, parameter in ttt_parameters(model).items():
        if name.endswith(("target_conv", "out_proj")):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def generate(
    model: TTTLMModel, user: torch.Tensor, *, graphs: bool
) -> tuple[torch.Tensor, list[float], dict[int, int]]:
    """Tokens [B, 9, T], milliseconds of every step, and updates by layer."""
    generator = LMGen(model, use_sampling=False)
    frames, step_ms = [], []
    before: dict[int, torch.Tensor] = {}
    updates: dict[int, int] = {}
    with nullcontext() if graphs else no_cuda_graph(), generator.streaming(user.shape[0]):
        for t in range(user.shape[2]):
            synchronize(user.device)
            started_at = time.perf_counter()
            frame = generator.step(user[:, :, t : t + 1])
            synchronize(user.device)
            step_ms.append(1e3 * (time.perf_counter() - started_at))
            if frame is not None:
                frames.append(frame.clone())
            for index, fast in fast_weights(model).items():
                if index not in before or not torch.equal(fast, before[index]):
                    before[index] = fast.clone()
                    updates[index] = updates.get(index, -1) + 1
    return torch.cat(frames, dim=2), step_ms, updates


def fast_weights(model: TTTLMModel) -> dict[int, torch.Tensor]:
    """By layer, a tensor of the streaming state that changes with every update alone."""
    states = {index: module._streaming_state for index, module in model.ttt_layers.items()}
    tensors = {index: state.tensors() for index, state in states.items() if state is not None}
    return {index: named.get("change", named.get("w1")) for index, named in tensors.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return float(torch.tensor(values).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--method", default="in_place")
    parser.add_argument("--write", default="sum")
    parser.add_argument("--chunk-size", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    ttt_args = TTTArgs(
        enabled=True,
        method=options.method,
        write=options.write,
        chunk_size=options.chunk_size,
    )
    period = options.chunk_size if options.method == "in_place" else ttt_args.mini_batch_size
    warm_up = min(20, options.steps // 4)
    generator = torch.Generator().manual_seed(1)
    results = []
    off_ms = {}
    for enabled in (False, True):
        model = make_model(ttt_args if enabled else TTTArgs(), device)
        for batch in options.batch:
            user = torch.randint(0, model.card, (batch, 8, options.steps), generator=generator)
            tokens, step_ms, updates = generate(model, user.to(device), graphs=True)
            if not enabled:
                off_ms[batch] = median(step_ms[warm_up:])
                continue
            expected = options.steps // period
            if set(updates.values()) != {expected}:
                sys.exit(f"wrong: {updates} updates a layer, and {expected} chunks were complete")
            without_graphs, _, _ = generate(model, user.to(device), graphs=False)
            if not torch.equal(tokens, without_graphs):
                share = (tokens == without_graphs).float().mean().item()
                sys.exit(f"wrong: only {share:.1%} of the tokens are those without CUDA graphs")
            on_ms = median(step_ms[warm_up:])
            results.append(
                {
                    "machine": name,
                    "method": f"{options.method} {options.write}",
                    "batch": batch,
                    "updates": expected,
                    "off_ms": off_ms[batch],
                    "on_ms": on_ms,
                    "ratio": on_ms / off_ms[batch],
                    "slowest_on_ms": max(step_ms[warm_up:]),
                    "state_gb": state_bytes(model, batch) / 1e9,
                }
            )
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
