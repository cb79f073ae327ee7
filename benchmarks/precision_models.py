"""Whole models of `precision.py`: how far one parallel pass is from streams and from float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.recall.model import ModelArgs, new_model, read_codes
from finetune.recall.streams import StreamArgs, draw
from ttt import TTTArgs, TTTLMModel, block_streaming

PRECISIONS = [torch.float32, torch.bfloat16]
Pass = tuple[str, int | None]
"""Precision, and frames of a stream's calls; None: one parallel pass."""
Write = Literal["sum", "delta"]
Target = Literal["text", "hidden"]
WRITES: list[Write] = ["sum", "delta"]
TARGETS: list[Target] = ["text", "hidden"]
BETA = 10.0
GATE = 0.1
"""Of the TTT layers: it is closed at the start."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of the models, and of what they read."""

    width: int
    chunk: int
    num_frames: int
    last_frames: int
    """Whose logits are compared."""
    short_call: int
    """Frames of a call."""
    long_call: int


FULL_MODEL = ModelSizes(256, 256, 1250, last_frames=256, short_call=64, long_call=256)
TINY_MODEL = ModelSizes(32, 32, 256, last_frames=32, short_call=8, long_call=32)


def measure_models(sizes: ModelSizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield what is compared, how far it is apart with each target, and the share of frames with
    the same best token (of logits)."""
    codes = draw(StreamArgs(), batch=1, seed=1, kind="old", num_frames=sizes.num_frames).codes
    for write in WRITES:
        found = {target: distances(write, target, codes.to(device), sizes) for target in TARGETS}
        for compared in found["text"]:
            yield {
                "write": write,
                "compared": compared,
                **{target: found[target][compared] for target in TARGETS},
            }


def distances(
    write: Write, target: Target, codes: Tensor, sizes: ModelSizes
) -> dict[str, dict[str, float]]:
    """Return distances by what is compared."""
    short, long = sizes.short_call, sizes.long_call
    models = make_models(write, target, sizes, codes.device)
    logits: dict[Pass, Tensor] = {}
    for precision, model in models.items():
        read = read_codes(model, codes)[:, :, : sizes.num_frames]
        for call in (None, short, long):
            logits[precision, call] = text_logits(model, read, call)[-sizes.last_frames :]
    pairs: list[tuple[Pass, Pass]] = [
        (("float32", None), ("float32", short)),
        (("bfloat16", None), ("bfloat16", short)),
        (("bfloat16", short), ("bfloat16", long)),
        (("bfloat16", None), ("bfloat16", long)),
        (("bfloat16", None), ("float32", None)),
        (("bfloat16", short), ("float32", None)),
    ]
    found = {}
    for one, other in pairs:
        a, b = logits[one], logits[other]
        same = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
        found[f"{describe(one)} against {describe(other)}"] = {
            "distance": distance(a, b),
            "same_best_token": same,
        }
    alone = f"one layer alone, same input, bfloat16: parallel against calls of {short}"
    found[alone] = {"distance": layer_distance(models["bfloat16"], read, short, sizes.last_frames)}
    return found


def make_models(
    write: Write, target: Target, sizes: ModelSizes, device: torch.device
) -> dict[str, TTTLMModel]:
    """Return a model in each precision, all with the weights of the one in bfloat16."""
    args = TTTArgs(
        enabled=True,
        start_layer=0,
        layer_frequency=1,
        write=write,
        target=target,
        write_strength=BETA,
        chunk_size=sizes.chunk,
    )
    make = partial(new_model, ModelArgs(width=sizes.width), StreamArgs(), args)
    make = partial(make, context=ModelArgs().context, seed=0)
    # Drawn on the CPU: a GPU's random numbers are others.
    weights = make(device=torch.device("cpu"), dtype=torch.bfloat16).state_dict()
    found = {}
    for dtype in PRECISIONS:
        model = make(device=device, dtype=dtype).eval()
        model.load_state_dict(weights)
        for layer in model.ttt_layers.values():
            layer.ttt_parameters()["target_gate"].data.fill_(GATE)
        found[name(dtype)] = model
    return found


@torch.no_grad()
def text_logits(model: TTTLMModel, read: Tensor, call_frames: int | None) -> Tensor:
    """Return logits [T, card] of one parallel pass (None), or of a stream, on the CPU."""
    if call_frames is None:
        return model.forward_text(read)[1][0, 0].cpu()
    with block_streaming(model, 1, call_frames):
        parts = [model.forward_text(part)[1][0, 0] for part in read.split(call_frames, 2)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def layer_distance(model: TTTLMModel, read: Tensor, call_frames: int, last_frames: int) -> float:
    """Return how far the first TTT layer's stream is from its parallel pass."""
    layer = next(iter(model.ttt_layers.values()))
    inputs: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.extend(args[:2]))
    model.forward_text(read)
    hook.remove()
    parallel = layer(*inputs, None)
    parts = zip(*(x.split(call_frames, 1) for x in inputs), strict=True)
    with layer.streaming(1):
        stream = torch.cat([layer(*part, None) for part in parts], 1)
    return distance(parallel[:, -last_frames:], stream[:, -last_frames:])


def distance(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def name(dtype: torch.dtype) -> str:
    """Return a type's name: float32."""
    return str(dtype).removeprefix("torch.")


def describe(one: Pass) -> str:
    """Return a pass in words: bfloat16 in calls of 64."""
    precision, call_frames = one
    return f"{precision} {'parallel' if call_frames is None else f'in calls of {call_frames}'}"
