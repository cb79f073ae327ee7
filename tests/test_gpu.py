"""On a CUDA device: `python -m pytest -m gpu`."""

import pytest
import torch
from helpers import (
    fast_state,
    random_codes,
    tiny_args,
    tiny_linear_args,
    tiny_lm_kwargs,
    tiny_model,
)
from moshi.models.lm import LMGen
from moshi.utils.compile import no_cuda_graph

from finetune.args import OptimArgs
from finetune.distributed import World
from finetune.loss import LossWeights, stream_sums
from finetune.model import trainable_by_role
from finetune.optim import Optimizer
from ttt import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def generate(model, user):
    generator = LMGen(model, use_sampling=False)
    with generator.streaming(user.shape[0]):
        frames = [generator.step(user[:, :, t : t + 1]) for t in range(user.shape[2])]
        states = [x for module in model.ttt_layers.values() for x in fast_state(module)]
    return torch.cat([frame.clone() for frame in frames if frame is not None], dim=2), states


METHODS = {
    "in_place": tiny_args(learning_rate=0.1),
    "linear": tiny_linear_args(base_lr=1.0),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.1, use_rope=True),
}


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cuda_graph_learns_as_eager_code_does(batch, args):
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
def test_training_in_bfloat16_learns(args):
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
    losses = []
    for _ in range(60):
        text, audio = stream_sums(model, model(codes), codes, LossWeights(0.5, 1.0))
        loss = text.loss / text.weight + audio.loss / audio.weight
        loss.backward()
        losses.append(loss.item())
        optimizer.step(max_norm=1.0, world=world, is_loss_finite=True)
    assert losses[-1] < 0.7 * losses[0]
