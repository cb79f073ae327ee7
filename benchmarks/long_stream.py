"""This program measures the size of fast weights in a stream of an hour: the table of
docs/mathematics.md.

python benchmarks/long_stream.py [--frames 50000]
"""

import argparse
import os
from typing import Any

os.environ["NO_TORCH_COMPILE"] = "1"

import torch
from torch import Tensor, nn

from ttt import TTTArgs, TTTLMModel, build_model
from ttt.layers import TTTLayer

CALL_FRAMES = 50
"""Frames of a call, and of attention's window."""

LM: dict[str, Any] = {
    **{"dim": 16, "text_card": 30, "existing_text_padding_id": 3, "card": 20, "n_q": 8, "dep_q": 4},
    **{"num_heads": 2, "num_layers": 3, "hidden_scale": 4, "causal": True, "gating": "silu"},
    **{"norm": "rms_norm_f32", "positional_embedding": "rope", "max_period": 10000},
    **{"depformer_dim": 16, "depformer_num_heads": 2, "depformer_num_layers": 1},
    **{"depformer_dim_feedforward": 64, "depformer_multi_linear": True, "depformer_context": 4},
    **{"depformer_gating": "silu", "depformer_pos_emb": "none", "depformer_weights_per_step": True},
    **{"delays": [0, 0, 1, 1, 1, 0, 1, 1, 1], "context": CALL_FRAMES},
}
"""A small model with the norm and the positions of Moshi, 1 + 4 + 4 streams."""

LAYERS: dict[str, Any] = {"enabled": True, "start_layer": 0, "layer_frequency": 2}
IN_PLACE: dict[str, Any] = {"target": "text", "lr_scale": "none", "chunk_size": 20}
SUM: dict[str, Any] = {**IN_PLACE, "write": "sum", "learning_rate": 1e-3}
DELTA: dict[str, Any] = {**IN_PLACE, "write": "delta"}
INNER_LOOP: dict[str, Any] = {"mini_batch_size": 4, "scan_checkpoint_group_size": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sum": SUM,
    "sum, max_delta_norm 1": {**SUM, "max_delta_norm": 1.0},
    "sum, state_decay 0.99": {**SUM, "state_decay": 0.99},
    "delta": DELTA,
    "delta, state_decay 0.99": {**DELTA, "state_decay": 0.99},
    "linear": {**INNER_LOOP, "method": "linear", "base_lr": 1.0},
    "mlp": {**INNER_LOOP, "method": "mlp", "base_lr": 0.1, "use_rope": True},
}
NOISE = {"target_proj": 0.1, "token_offset": 0.05}
"""By parameter, how large the random change is; 0.2 for others. A position's share of the step, 1/4
and more, must stay above zero."""


def random_model(args: TTTArgs) -> TTTLMModel:
    """A model with random weights, those of TTT as large as after some training."""
    torch.manual_seed(0)
    model = build_model(LM, args, device="cpu", dtype=torch.float64).eval()
    for module in model.ttt_layers.values():
        for name, parameter in module.ttt_parameters().items():
            if name == "target_conv":
                nn.init.normal_(parameter)
            elif name != "log_write_strength":
                parameter.data += NOISE.get(name, 0.2) * torch.randn_like(parameter)
            if name == "gate":
                parameter.data += 1.0
    return model.to(torch.float32)


def speech_and_silence(num_frames: int) -> Tensor:
    """Codes [1, 9, T]: speech with pauses (text padding, one code), then digital silence, then one
    segment over and over, a fifth of the stream each, and speech again."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, LM["text_card"], (1, 1, num_frames), generator=generator)
    audio = torch.randint(0, LM["card"], (1, 8, num_frames), generator=generator)
    speech = torch.cat([text, audio], dim=1)
    pauses = torch.arange(num_frames) // 7 % 3 == 0
    speech[:, 0, pauses] = 3
    speech[:, 1:, pauses] = 1
    fifth = num_frames // 5
    speech[:, 0, fifth : 2 * fifth] = 3
    speech[:, 1:, fifth : 2 * fifth] = 1
    speech[:, :, 2 * fifth : 3 * fifth] = speech[:, :, :25].repeat(1, 1, fifth)[:, :, :fifth]
    return speech


@torch.no_grad()
def stream(model: TTTLMModel, codes: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Text logits [T, card], sizes of the layers' fast weights after every call (with `in_place`
    ‖S‖ / ‖W0‖, else relative to their start), and the final fast weights."""
    modules = model.ttt_layers.values()
    logits, sizes = [], []
    with model.streaming(1):
        starts = [fast_weights(m).norm() for m in modules]
        for part in codes.split(CALL_FRAMES, dim=2):
            logits.append(model.forward_text(part)[1][0, 0])
            sizes.append([size(m, start) for m, start in zip(modules, starts, strict=True)])
        states = [fast_weights(m).double() for m in modules]
    return torch.cat(logits), torch.tensor(sizes), states


def fast_weights(module: TTTLayer) -> Tensor:
    """Fast weights of a streaming module, or with `in_place` their change, as one vector."""
    return torch.cat([x.flatten() for x in module._streaming_state.fast_weights()])


def size(module: TTTLayer, norm_at_start: Tensor) -> Tensor:
    """Return how large the fast weights of a streaming module are; see `stream`."""
    if module.is_change:
        return module.stream_change()[0]
    return fast_weights(module).norm() / norm_at_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=50_000)
    codes = speech_and_silence(parser.parse_args().frames)
    print("| | speech | silence | one segment | speech | speech |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, options in METHODS.items():
        _, sizes, _ = stream(random_model(TTTArgs(**LAYERS, **options)), codes)
        largest = [f"{fifth.max():.2f}" for fifth in sizes.chunk(5)]
        print(f"| {name} | {' | '.join(largest)} |", flush=True)


if __name__ == "__main__":
    main()
