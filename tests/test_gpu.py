"""On a CUDA device: `python -m pytest -m gpu`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tools import tiny_mimi, tiny_tokenizer, write_dataset
from helpers import (
    fast_state,
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_lm_kwargs,
    tiny_model,
    tiny_relative_args,
)
from moshi.models.lm import LMGen
from moshi.utils.compile import no_cuda_graph

from finetune.config import DataArgs, OptimArgs
from finetune.data import Codec, build_train_loader, codec, open_store
from finetune.distributed import World
from finetune.model import trainable_by_role
from finetune.step import LossWeights, Optimizer, stream_sums
from ttt import TTTArgs, build_model, ops
from ttt.ops.in_place import chunks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def generate(model: Any, user: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    generator = LMGen(model, use_sampling=False)
    with generator.streaming(user.shape[0]):
        frames = [generator.step(user[:, :, t : t + 1]) for t in range(user.shape[2])]
        states = [x for module in model.ttt_layers.values() for x in fast_state(module)]
    return torch.cat([frame.clone() for frame in frames if frame is not None], dim=2), states


RULES: dict[str, Any] = {
    "sum": tiny_args(learning_rate=0.1),
    "bounded, decay": tiny_args(learning_rate=0.1, max_delta_norm=0.5, state_decay=0.9),
    "delta": tiny_delta_args(state_decay=0.9),
    "relative": tiny_relative_args(),
    "relative delta": tiny_relative_args(write="delta"),
}
METHODS = RULES | {
    "linear": tiny_linear_args(base_lr=1.0),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.1, use_rope=True),
}


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cuda_graph_learns_as_eager_code_does(batch: int, args: TTTArgs) -> None:
    """Chunks end within the captured step; Python does not run there."""
    model = tiny_model(args, dtype=torch.float32, context=80).cuda()
    user = random_codes(batch=batch, num_frames=60)[:, 5:].cuda()
    start = generate(model, user[:, :, :3])[1]
    graphed, graphed_states = generate(model, user)
    assert (graphed_states[0] - start[0]).norm() > 0
    with no_cuda_graph():
        eager, eager_states = generate(model, user)
    for a, b in zip(graphed_states, eager_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert (graphed == eager).float().mean() > 0.99


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_frames_on_the_device_equal_the_whole_sequence(args: TTTArgs) -> None:
    """The kernels of a step against the fast form that training uses."""
    model = tiny_model(args, dtype=torch.float32, context=80).cuda()
    codes = random_codes(num_frames=60).cuda()
    with torch.no_grad():
        whole = model.forward_text(codes)[1]
        with model.streaming(2):
            frames = [model.forward_text(frame)[1] for frame in codes.split(1, dim=2)]
    torch.testing.assert_close(torch.cat(frames, dim=2), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("super_chunk", [64, 2048])
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_fast_forms_in_bfloat16_are_as_close_as_its_rounding(
    rule: str, super_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SUPER_CHUNK_FRAMES", super_chunk)
    monkeypatch.setattr(chunks, "WHOLE_FRAMES", super_chunk)
    torch.manual_seed(0)
    z = torch.randn(2, 300, 64).bfloat16()
    v, d_out = torch.randn(2, 300, 32).bfloat16(), torch.randn(2, 300, 32).bfloat16()
    results: list[Any] = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (z, v)]
        if rule == "sum":
            out = ops.in_place_ttt(*inputs, lr=0.01, chunk_size=16, decay=0.95)
        else:
            out = ops.in_place_delta(*inputs, beta=10.0, chunk_size=16, decay=0.95)
        grads = torch.autograd.grad(out, inputs, d_out.to(device, dtype))
        results.append([x.cpu().double() for x in (out, *grads)])
    for exact, rounded in zip(*results, strict=True):
        assert (rounded - exact).norm() / exact.norm() < 0.03


def test_codes_made_ahead_and_kept_codes_are_those_made_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mimi computes on its own stream beside the training step, which keeps the device busy."""
    jsonl = write_dataset(tmp_path, [3.2, 2.1, 1.5])
    monkeypatch.setattr(codec, "_PIECE_FRAMES", 9)
    busy = torch.randn(4096, 4096, device="cuda")

    def epochs(**options: Any) -> tuple[torch.Tensor, int, Any]:
        data = DataArgs(str(jsonl), shuffle=True, **options)
        mimi = Codec(
            copy.deepcopy(tiny_mimi()), tiny_tokenizer(), moshi_codebooks=8, user_codebooks=8,
            device="cuda",
        )  # fmt: skip
        loader = build_train_loader(
            data, mimi, duration_sec=1.0, batch_size=2, seed=0, device="cuda",
            store=open_store(data),
        )  # fmt: skip
        codes: list[Any] = []
        for _ in range(8):
            codes.append(next(loader).codes)
            for _ in range(20):
                busy @ busy
        loader.close()
        return torch.cat(codes), loader.num_encoded, next(mimi.mimi.parameters()).device.type

    cache = str(tmp_path / "cache")
    in_turn, *_ = epochs(num_workers=0, prefetch_steps=0)
    assert len(in_turn.unique()) > 5
    for options, num_encoded, place in (
        ({"num_workers": 0}, 8, "cuda"),
        ({"num_workers": 2, "cache_dir": cache}, 8, "cuda"),
        ({"num_workers": 2, "cache_dir": cache}, 0, "cpu"),
    ):
        codes, *rest = epochs(**options)
        assert torch.equal(codes, in_turn) and rest == [num_encoded, place]


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_training_in_bfloat16_learns(args: TTTArgs) -> None:
    torch.manual_seed(0)
    model = build_model(
        tiny_lm_kwargs(norm="rms_norm_f32", positional_embedding="rope"),
        args,
        device="cuda",
        dtype=torch.bfloat16,
        gradient_checkpointing=True,
    )
    world = World(0, 1, torch.device("cuda"))
    optimizer = Optimizer(trainable_by_role(model), OptimArgs(lr=3e-3, ttt_lr=3e-3), max_steps=60)
    codes = random_codes(num_frames=40).cuda()
    losses: list[Any] = []
    for _ in range(60):
        text, audio = stream_sums(model, model(codes), codes, LossWeights(0.5, 1.0))
        loss = text.loss / text.weight + audio.loss / audio.weight
        loss.backward()
        losses.append(loss.item())
        optimizer.step(max_norm=1.0, world=world, is_loss_finite=True)
    assert losses[-1] < 0.7 * losses[0]
