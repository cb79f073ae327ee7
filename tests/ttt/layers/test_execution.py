"""Compiling or checkpointing layers changes nothing that they compute, and saves what it should."""

import logging
from typing import Any

import pytest
import torch
from helpers import (
    as_if_trained,
    assert_layer_keeps_alone,
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_lm_kwargs,
    tiny_model,
)
from moshi.modules.lora import replace_all_linear_with_lora
from test_training_path import METHODS, PLAIN, WEIGHTS, assert_same, loss_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.step import stream_sums
from ttt import TTTArgs, build_model
from ttt.layers import blocks, execution
from ttt.layers.execution import Execution
from ttt.ops.in_place import delta_window


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
def test_compiled_layers_compute_the_same_and_share_what_is_compiled(
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
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    results: dict[bool, list[Any]] = {}
    for compile in (False, True):
        model = prepared(METHODS[name], lora=True, checkpointing=mode, compile=compile)
        results[compile] = [
            loss_and_gradients(model, random_codes(num_frames=30, seed=seed), with_heads=False)
            for seed in range(2)
        ]
    log.removeHandler(handler)
    assert not records
    for found, expected in zip(results[True], results[False], strict=True):
        assert_same(found, expected, rtol=1e-12)
    # The first layer of a model whose embeddings are frozen needs no gradient to its input, and is
    # compiled apart; all others are one and the same, and so are the steps of training.
    if name == "plain":
        assert len(model.transformer.layers) == 3
        blocks_of_a_model = {"layer", "first layer", "depth input", "depth layer"}
        losses = {"text", "audio"}
        assert graphs["unique_graphs"] - before <= len(blocks_of_a_model) + len(losses)


def test_a_compiled_layer_that_is_made_again_keeps_its_input_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a compiler divides into two passes it may keep, whatever is to be made again."""
    monkeypatch.setattr(execution, "BACKEND", "aot_eager_decomp_partition")
    torch._dynamo.reset()
    execution._compiled.cache_clear()
    model = prepared(PLAIN, lora=True, checkpointing=True, compile=True)
    codes = random_codes(num_frames=300)
    x = torch.randn(2, 300, model.dim, dtype=torch.float64, requires_grad=True)
    assert_layer_keeps_alone(model, codes, x)


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    @property
    def count(self) -> int:
        return len(self.shapes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.shapes.append(tuple(tuple(factor.shape) for factor in args[:2]))
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


@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_that_is_made_again_learns_once(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But if its results are more than added to, all of it has to be made again."""
    solved: list[torch.Tensor] = []

    def counted(gram: torch.Tensor, beta: Any) -> Any:
        solved.append(gram)
        return inverse(gram, beta)

    inverse = delta_window.inverse
    monkeypatch.setattr(delta_window, "inverse", counted)
    options: dict[str, Any] = {"layer_scale": 0.3} if scaled else {}
    codes, results, counts = random_codes(num_frames=30), [], []
    for checkpointing in (False, True):
        model = tiny_model(tiny_delta_args(), **options).train()
        model.execution.checkpointing = checkpointing
        solved.clear()
        results.append(loss_and_gradients(model, codes, with_heads=False))
        counts.append(len(solved))
    assert_same(results[1], results[0], rtol=1e-13)
    assert counts[0] == len(model.ttt_layers)
    assert counts[1] == counts[0] * (2 if scaled else 1)


def test_the_last_product_of_a_layer_that_is_made_again_is_made_once() -> None:
    """No gradient needs its result, with TTT in the layer as without."""
    counts: dict[Any, int] = {}
    for args in (PLAIN, tiny_delta_args()):
        model = prepared(args, lora=True, checkpointing=True)
        hidden = model.transformer.layers[0].gating.linear_out.in_features
        frames, width = 2 * 30, model.dim
        with Products() as products:
            loss_and_gradients(model, random_codes(num_frames=30), with_heads=False)
        shapes = ((frames, hidden), (hidden, width))
        counts[args.enabled] = products.shapes.count(shapes)
        assert counts[args.enabled] == len(model.transformer.layers)


def test_the_backward_pass_of_layers_that_are_made_again_can_run_twice() -> None:
    codes, results = random_codes(num_frames=30), []
    for checkpointing in (False, True):
        model = tiny_model(tiny_delta_args()).train()
        model.execution.checkpointing = checkpointing
        text, _ = stream_sums(model, model(codes, with_heads=False), codes, WEIGHTS)
        text.loss.backward(retain_graph=True)
        text.loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same((0.0, results[1]), (0.0, results[0]), rtol=1e-13)


def partly_selective(args: TTTArgs, number: int, **more: Any) -> Any:
    torch.manual_seed(0)
    kwargs = tiny_lm_kwargs(norm="rms_norm_f32", positional_embedding="rope")
    options: dict[str, Any] = {"gradient_checkpointing": True, "selective_layers": number}
    model = build_model(kwargs, args, device="cpu", dtype=torch.float64, **options, **more)
    for module in model.ttt_layers.values():
        as_if_trained(module)
    return model


@pytest.mark.parametrize("args", METHODS.values(), ids=METHODS.keys())
def test_some_layers_keep_more_and_compute_the_same(
    args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    codes = random_codes(num_frames=30)
    counts, results = [], []
    for number in range(4):
        model = partly_selective(args, number)
        with Products() as products:
            results.append(loss_and_gradients(model, codes, with_heads=False))
        counts.append(products.count)
        assert_same(results[-1], results[0], rtol=1e-13)
    # One layer's products after the other are made once.
    assert sorted(set(counts), reverse=True) == counts


@pytest.mark.parametrize("name", ["plain", pytest.param("delta", marks=pytest.mark.slow)])
def test_some_compiled_layers_keep_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    monkeypatch.setattr(execution, "MIN_KEPT_WIDTH", 16)
    torch._dynamo.reset()
    execution._compiled.cache_clear()
    codes = random_codes(num_frames=30)
    compiled, eager = (
        loss_and_gradients(
            partly_selective(METHODS[name], 1, compile=compile), codes, with_heads=False
        )
        for compile in (True, False)
    )
    assert_same(compiled, eager, rtol=1e-12)


def test_the_last_layers_keep_more_first_and_those_with_ttt_at_last() -> None:
    args = tiny_args(start_layer=1, layer_frequency=2)
    chosen = []
    for number in range(4):
        model = partly_selective(args, number)
        modes = [layer.execution.checkpointing for layer in model.transformer.layers]
        chosen.append([index for index, mode in enumerate(modes) if mode == "selective"])
        for index, module in model.ttt_layers.items():
            assert module.execution is model.transformer.layers[index].execution
    assert chosen == [[], [2], [0, 2], [0, 1, 2]]
    with pytest.raises(ValueError, match="the model's 3 layers, got 4"):
        partly_selective(args, 4)


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


def test_layers_share_one_execution() -> None:
    model = tiny_model(tiny_args())
    assert isinstance(model.execution, Execution)
    for module in [*model.transformer.layers, *model.ttt_layers.values()]:
        assert module.execution is model.execution
