"""The fast path of whole sequences computes what the stock model computes: values and gradients."""

import logging
import os
import subprocess
import sys
from pathlib import Path
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
from moshi.modules.rope import apply_rope
from moshi.utils.compile import no_compile
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.step import LossWeights, chunked_loss, stream_sums
from ttt import TTTArgs, TTTLMModel, build_model, without_ttt
from ttt.layers import blocks, depth, execution
from ttt.layers.blocks import Linear
from ttt.layers.execution import Execution
from ttt.ops.moshi import attention
from ttt.ops.moshi.attention import causal_attention
from ttt.ops.moshi.depth_attention import depth_attention
from ttt.ops.rope import rope_table, rotate

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


# --- attention ------------------------------------------------------------------------------------


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int
) -> torch.Tensor:
    """With a mask of all pairs."""
    frames = torch.arange(q.shape[1])
    distance = frames[:, None] - frames
    visible = (distance >= 0) & (distance < context)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


@pytest.mark.parametrize("context", [1, 2, 5, 8, 22, 23, 40])
def test_a_window_equals_the_masked_form(context: int) -> None:
    inputs = [torch.randn(2, 23, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    q, k, v = inputs
    found = causal_attention(q, k, v, context)
    expected = masked_attention(q, k, v, context)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_window_takes_less_than_all_pairs() -> None:
    class Counter(TorchDispatchMode):
        pairs = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in str(func):
                self.pairs += args[0].shape[2] * args[1].shape[2]
            return func(*args, **(kwargs or {}))

    pairs: dict[int, int] = {}
    for context in (10, 50, 200):
        with Counter() as counter:
            q, k, v = (torch.randn(1, 200, 1, 8) for _ in range(3))
            causal_attention(q, k, v, context)
        pairs[context] = counter.pairs
    assert pairs[10] < pairs[50] / 3 < pairs[200] / 3


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_is_moshis_to_the_bit(interleave: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 7, 3, 8).to(dtype)
    table = rope_table(torch.arange(7)[:, None], 8, 1000.0, interleave=interleave)
    with no_compile():
        expected = apply_rope(q, k, torch.zeros(2, dtype=torch.long), 1000.0, interleave, True)
    for x, turned in zip((q, k), expected, strict=True):
        assert torch.equal(rotate(x, table, interleave=interleave), turned)


def test_steps_of_different_frames_do_not_see_each_other() -> None:
    qkv = torch.randn(5, 7, 3 * 8, dtype=torch.float64)
    out = depth_attention(qkv, num_heads=2)
    for frame in range(7):
        q, k, v = qkv[:, frame].view(1, 5, 3, 2, 4).unbind(2)
        expected = masked_attention(q, k, v, context=5)[0].flatten(1)
        torch.testing.assert_close(out[:, frame], expected)


INTERPRETED = """
import contextlib, torch
torch.cuda.device_of = lambda x: contextlib.nullcontext()
from ttt.ops.moshi import depth_kernels
from ttt.ops.moshi.depth_attention import depth_attention
for steps, frames, heads, width in [(8, 19, 2, 16), (5, 9, 1, 32)]:
    qkv = torch.randn(steps, frames, 3 * heads * width, requires_grad=True)
    out = depth_attention(qkv, heads)
    d_out = torch.randn_like(out)
    (d_qkv,) = torch.autograd.grad(out, qkv, d_out)
    poison = torch.empty_like
    torch.empty_like = lambda x: torch.full_like(x, float("nan"))
    torch.testing.assert_close(depth_kernels.forward(qkv.detach(), heads), out)
    torch.testing.assert_close(depth_kernels.backward(d_out, qkv.detach(), heads), d_qkv)
    torch.empty_like = poison
"""


def test_the_kernels_of_depth_attention_as_interpreted() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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


# --- compilation and checkpointing ----------------------------------------------------------------


def prepared(args: TTTArgs, *, lora: bool, **options: Any) -> Any:
    """A model of Moshi's norms and positions with TTT as if trained."""
    model = tiny_model(args, norm="rms_norm_f32", positional_embedding="rope").train()
    if lora:
        replace_all_linear_with_lora(model, 4, 2.0)
        own = {id(p) for m in model.ttt_layers.values() for p in m.ttt_parameters().values()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or id(parameter) in own)
    model.execution.__dict__.update(options)
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_what_is_kept_for_the_backward_pass_changes_nothing(
    args: Any, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    codes = random_codes(num_frames=30)
    results = [
        loss_and_gradients(prepared(args, lora=lora, checkpointing=mode), codes, with_heads=False)
        for mode in (False, True, "selective")
    ]
    assert_same(results[1], results[0], rtol=1e-13)
    assert_same(results[2], results[0], rtol=1e-13)


@pytest.mark.parametrize(
    "mode", [*(pytest.param(mode, marks=pytest.mark.slow) for mode in (False, True)), "selective"]
)
@pytest.mark.parametrize(
    "name",
    ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "plain")],
)
def test_compiled_layers_compute_the_same(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As traced, and without comment; what inductor makes of it is for the tests on a GPU."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    torch._dynamo.reset()
    execution._compiled.cache_clear()
    torch._higher_order_ops.wrap.warning_once.cache_clear()
    records: list[Any] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    log = logging.getLogger("torch._higher_order_ops.wrap")
    log.addHandler(handler)
    codes = random_codes(num_frames=30)
    results = [
        loss_and_gradients(
            prepared(METHODS[name], lora=True, checkpointing=mode, compile=compile),
            codes,
            with_heads=False,
        )
        for compile in (False, True)
    ]
    log.removeHandler(handler)
    assert not records
    assert_same(results[1], results[0], rtol=1e-12)


def test_all_layers_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer of a model whose embeddings are frozen needs no gradient to its input, and is
    compiled apart; all others are one and the same, and so are the steps of training."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    model = prepared(PLAIN, lora=True, compile=True, checkpointing=True)
    assert len(model.transformer.layers) == 3
    for seed in range(2):
        codes = random_codes(num_frames=12, seed=seed)
        loss_and_gradients(model, codes, with_heads=False)
    blocks_of_a_model = {"layer", "first layer", "depth input", "depth layer"}
    losses = {"text", "audio"}
    assert graphs["unique_graphs"] - before <= len(blocks_of_a_model) + len(losses)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_makes_no_large_product_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    counts: dict[bool | str, int] = {}
    for mode in (False, "selective", True):
        model = prepared(PLAIN, lora=False, checkpointing=mode)
        with Products() as products:
            loss_and_gradients(model, random_codes(num_frames=12), with_heads=False)
        counts[mode] = products.count
    assert counts[False] == counts["selective"] < counts[True]


def test_evaluation_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(execution, "_compiled", refuse)
    model = prepared(PLAIN, lora=False, compile=True)
    with torch.no_grad():
        model(random_codes(num_frames=12))
    with pytest.raises(AssertionError, match="compiled"):
        model(random_codes(num_frames=12))


def test_evaluation_compiles_no_graph_for_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    model = prepared(PLAIN, lora=False, compile=True)
    with torch.no_grad():
        for num_frames in (12, 13):
            codes = random_codes(num_frames=num_frames)
            stream_sums(model, model(codes, with_heads=False), codes, WEIGHTS)
    assert graphs["unique_graphs"] == before


def test_sequences_of_many_lengths_train_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives up on a function after eight forms of it."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    torch._dynamo.config.recompile_limit = 8
    torch._dynamo.reset()
    execution._compiled.cache_clear()
    model = prepared(PLAIN, lora=False, compile=True)
    for num_frames in range(12, 22):
        x = torch.randn(1, num_frames, model.dim, dtype=torch.float64, requires_grad=True)
        weights = blocks.layer_of(model.transformer.layers[0]).mlp
        assert weights is not None
        model.execution.layer(blocks.project, x, weights.inward).sum().backward()


UNCOVERED: dict[str, Any] = {
    "shared keys": {"kv_repeat": 2},
    "positions in the depth transformer": {"depformer_pos_emb": "rope"},
}


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("shape", UNCOVERED.values(), ids=UNCOVERED.keys())
def test_layers_of_other_kinds_are_checkpointed_as_well(
    shape: Any, args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    sizes, results = {}, {}
    for mode in (False, True, "selective"):
        model = tiny_model(args, **shape).train()
        model.execution.checkpointing = mode
        kept = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        codes = random_codes(num_frames=30)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(codes, with_heads=False)
        sizes[mode] = kept
        results[mode] = loss_and_gradients(model, codes, with_heads=False)
    assert_same(results[True], results[False], rtol=1e-13)
    assert_same(results["selective"], results[False], rtol=1e-13)
    if args is PLAIN:
        stock_layers = 3 if "kv_repeat" in shape else 1
        assert sizes[True] < sizes[False] / 2 and sizes["selective"] < sizes[False]
        assert stock_layers == 1 or sizes["selective"] < sizes[False] / 2


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_a_stream_with_gradients_advances_once(args: Any) -> None:
    model = prepared(args, lora=False, checkpointing=True)
    attention = model.transformer.layers[0].self_attn
    with model.streaming(2):
        out, _ = model.forward_text(random_codes(num_frames=1))
        before = attention._streaming_state.offset.clone()
        out.sum().backward()
        assert torch.equal(attention._streaming_state.offset, before)
        assert before.tolist() == [1, 1]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_compiled_code_asks_what_the_device_can_do(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._capability.cache_clear()

    @torch.compile(backend="eager", fullgraph=True)
    def answer(x: torch.Tensor) -> Any:
        return x + 1 if attention._has_flash(x.device) else x - 1

    assert answer(torch.zeros(1)).item() == (1 if capability >= (8, 0) else -1)
    attention._capability.cache_clear()


def test_flash_attention_gets_what_it_takes() -> None:
    def suits(width: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return attention._suits_flash(torch.empty(1, 1, 1, width, dtype=dtype))

    assert suits(128) and suits(256) and suits(64, torch.float16)
    assert not suits(12) and not suits(264) and not suits(64, torch.float32)


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


def test_layers_share_one_execution() -> None:
    model = tiny_model(tiny_args())
    assert isinstance(model.execution, Execution)
    for module in [*model.transformer.layers, *model.ttt_layers.values()]:
        assert module.execution is model.execution
