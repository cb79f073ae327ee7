"""The fast path of whole sequences computes what the stock model computes: values and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    moshi_like,
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_lm_kwargs,
    tiny_model,
)
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_all_linear_with_lora
from moshi.utils.compile import no_compile
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.step import LossWeights, chunked_loss, stream_sums
from ttt import TTTArgs, TTTLMModel, build_model, without_ttt
from ttt.layers import blocks, depth
from ttt.layers.blocks import Linear

PLAIN = TTTArgs(enabled=False)
WEIGHTS = LossWeights(text_padding=0.3, first_codebook=7.0)
METHODS: dict[str, Any] = {
    "plain": PLAIN,
    "sum": tiny_args(target="hidden", lr_scale="none"),
    "sum, relative": tiny_args(lr_scale="relative", learning_rate=0.1),
    "delta": tiny_delta_args(),
    "linear": tiny_linear_args(),
    "mlp": tiny_linear_args(method="mlp", use_rope=True),
}


def loss_and_gradients(
    model: TTTLMModel, codes: torch.Tensor, *, with_heads: bool
) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    text, audio = stream_sums(model, model(codes, with_heads=with_heads), codes, WEIGHTS)
    # Of different size, as in training: a gradient that is scaled wrongly shows.
    loss = 3 * text.loss / text.weight + audio.loss / audio.weight
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(
    one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]], *, rtol: float
) -> None:
    (loss, grads), (other_loss, other_grads) = one, other
    assert loss == pytest.approx(other_loss, rel=rtol)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        scale = other_grads[name].norm()
        assert (grad - other_grads[name]).norm() <= rtol * scale + 1e-14, name


# --- against the stock model ----------------------------------------------------------------------


SHAPES: dict[str, Any] = {
    "layer norm, sine": tiny_lm_kwargs(),
    "as Moshi": moshi_like(),
    "halves in RoPE": tiny_lm_kwargs(positional_embedding="rope_concat"),
    "scaled layers": tiny_lm_kwargs(layer_scale=0.3, depformer_layer_scale=0.2),
    "shared steps": tiny_lm_kwargs(depformer_weights_per_step_schedule=[0, 1, 1, 2]),
    "the same weights at all steps": tiny_lm_kwargs(
        depformer_weights_per_step=False, depformer_multi_linear=False
    ),
    "no gates": tiny_lm_kwargs(gating="none", depformer_gating="silu"),
    "biases": tiny_lm_kwargs(bias_proj=True),
    "norms of the depth transformer": tiny_lm_kwargs(depformer_norm="layer_norm"),
    "MLPs of uneven width": tiny_lm_kwargs(depformer_dim_feedforward=[64, 64, 48, 32]),
    "positions in the depth transformer": tiny_lm_kwargs(depformer_pos_emb="rope"),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("lm_kwargs", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_the_stock_model(
    lm_kwargs: dict[str, Any], lora: bool
) -> None:
    """Longer than the attention's window; Moshi's own norms and positions are in float32."""
    torch.manual_seed(0)
    stock = LMModel(device="cpu", dtype=torch.float64, **lm_kwargs)
    ours = build_model(lm_kwargs, PLAIN, device="cpu", dtype=torch.float64)
    if lora:
        for model in (stock, ours):
            replace_all_linear_with_lora(model, 3, 1.7)
    ours.load_state_dict(stock.state_dict())
    codes = random_codes(num_frames=30)
    with no_compile():
        output = stock(codes)
    for a, b in zip(_logits(ours(codes)), _logits(output), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)

    text, audio = stream_sums(stock, output, codes, WEIGHTS)
    loss = 3 * text.loss / text.weight + audio.loss / audio.weight
    loss.backward()
    expected = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    for with_heads in (True, False):
        found = loss_and_gradients(ours, codes, with_heads=with_heads)
        assert_same(found, (loss.item(), expected), rtol=1e-5)


def test_the_depth_transformer_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(PLAIN)
    results: list[Any] = []
    for length in (depth.CHUNK_FRAMES, 7):
        monkeypatch.setattr(depth, "CHUNK_FRAMES", length)
        results.append(loss_and_gradients(model, random_codes(), with_heads=False))
    assert_same(*results, rtol=1e-13)


def _logits(output: Any) -> tuple[Any, Any, Any, Any]:
    return output.text_logits, output.logits, output.text_mask, output.mask


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["weight", "bias", "lora"])
def test_a_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", 100)
    torch.manual_seed(0)
    hidden = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    shapes: dict[str, Any] = {"weight": (11, 6), "bias": (11,), "lora_a": (2, 6), "lora_b": (11, 2)}
    names = {"weight": ["weight"], "bias": ["weight", "bias"]}.get(parts) or list(shapes)
    head = {n: torch.randn(*shapes[n], dtype=torch.float64).requires_grad_() for n in names}
    if parts == "lora":
        head["weight"].requires_grad_(False)
        del head["bias"]
    targets, weight = torch.randint(0, 11, (23,)), torch.rand(23, dtype=torch.float64)
    loss, nll = chunked_loss.chunked_cross_entropy(
        hidden, Linear(**head, scaling=1.5), targets, weight, compile=False
    )
    logits = blocks.project(hidden, Linear(**head, scaling=1.5))
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad
    inputs = [hidden, *(p for p in head.values() if p.requires_grad)]
    found = torch.autograd.grad(0.1 * loss, inputs)
    for a, b in zip(
        found, torch.autograd.grad(0.1 * (expected * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_loss_never_has_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_LOGITS", 5000)

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    hidden = torch.randn(400, 4, requires_grad=True)
    head = Linear(torch.randn(100, 4))
    with Largest() as largest:
        loss, _ = chunked_loss.chunked_cross_entropy(
            hidden, head, torch.zeros(400, dtype=torch.long), torch.ones(400), compile=False
        )
        loss.backward()
    assert largest.size <= 5000


# --- with TTT -------------------------------------------------------------------------------------


def test_turned_queries_and_keys_have_the_values_type() -> None:
    """The fast scan takes frames of one type."""
    model = tiny_model(METHODS["mlp"], dtype=torch.bfloat16)
    x = torch.randn(1, 6, 16, dtype=torch.bfloat16)
    q, k, v, *_ = model.transformer.layers[0].ttt._prepare(x)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_without_ttt_whole_sequences_are_the_plain_models(args: Any) -> None:
    model, plain = tiny_model(args), tiny_model(PLAIN)
    plain.load_state_dict(model.state_dict(), strict=False)
    codes = random_codes(num_frames=30)
    with without_ttt(model):
        found = model(codes).text_logits
    assert torch.equal(found, plain(codes).text_logits)
    assert args is PLAIN or not torch.equal(model(codes).text_logits, found)
