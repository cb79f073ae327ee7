"""Rows of a stream that are switched off and on."""

from typing import Any

import pytest
import torch
from helpers import random_codes, tiny_delta_args, tiny_linear_args, tiny_model
from moshi.models.lm import LMGen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ttt

ARGS: dict[str, Any] = {
    "delta": tiny_delta_args(),
    "linear": tiny_linear_args(),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.4, use_rope=True),
}
every_rule = pytest.mark.parametrize("rule", ARGS)


class Graph(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: operations that are captured once, by what runs within, and
    are replayed in the same memory, without any Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            again = tree_leaves(func(*args, **kwargs))
            for place, value in zip(tree_leaves(out), again, strict=True):
                # What changes its argument, or is a view of it, is in its place already.
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@every_rule
def test_a_row_is_switched_off_in_a_graph_that_was_captured_with_all_rows_on(rule: str) -> None:
    """LMGen captures its second step, before anybody may have switched a row off."""
    model = tiny_model(ARGS[rule], context=60)
    module = model.ttt_layers[0]
    x, embeddings = torch.randn(2, 2, 1, model.dim, dtype=model.dtype)
    found = []
    for is_captured in (False, True):
        with torch.no_grad(), model.streaming(2):
            model.forward_text(random_codes(num_frames=13))
            before = ttt.get_state(model)
            with Graph() as graph:
                out = module(x, embeddings, None)
            ttt.set_state(model, before)
            ttt.use_in_rows(model, torch.tensor([False, True]))
            if is_captured:
                graph.replay()
            else:
                out = module(x, embeddings, None)
            found.append([out, *ttt.get_state(model).values()])
    for eager, replayed in zip(*found, strict=True):
        assert torch.equal(eager, replayed)


@every_rule
def test_a_row_learns_again_in_generation_that_stock_moshi_runs(rule: str) -> None:
    model = tiny_model(ARGS[rule], context=60)
    generator, codes = LMGen(model, use_sampling=False), random_codes(num_frames=30)
    with generator.streaming(2):
        for t, heard in enumerate(codes[:, 5:].split(1, dim=2)):
            ttt.use_in_rows(generator, torch.tensor([t >= 5, True]))
            generator.step(heard)
        for module in model.ttt_layers.values():
            assert (module.stream_change() > 1e-3).all()


def test_switching_a_row_off_neither_pauses_it_nor_ends_its_pause() -> None:
    model = tiny_model(ARGS["delta"])
    with torch.no_grad(), model.streaming(2):
        module = model.ttt_layers[0]
        model.set_exec_mask(torch.tensor([True, False]))
        for rows in ([False, True], [True, True]):
            ttt.use_in_rows(model, torch.tensor(rows))
            assert ttt.get_state(model)["transformer.layers.0.gating.exec_mask"].tolist() == [
                True,
                False,
            ]
        model.set_exec_mask(torch.tensor([True, True]))
        ttt.use_in_rows(model, torch.tensor([False, True]))
        model.set_exec_mask(torch.tensor([True, True]))
        model.reset_streaming()
        model.forward_text(random_codes(num_frames=13))
        change = module.stream_change()
        assert change[0] == 0 and change[1] > 1e-3


NO_MASKS: list[Any] = [
    (torch.tensor([True]), r"bool \[1\]"),
    (torch.tensor([True, False, True]), r"bool \[3\]"),
    (torch.tensor([[True, False]]), r"bool \[1, 2\]"),
    (torch.tensor(True), r"bool \[\]"),
    (torch.tensor([1, 0]), r"int64 \[2\]"),
    (torch.tensor([1.0, 0.0]), r"float32 \[2\]"),
    ([True], r"bool \[1\]"),
]


@pytest.mark.parametrize("take_rows", [ttt.reset, ttt.use_in_rows, ttt.clear_rows])
@pytest.mark.parametrize(("rows", "what"), NO_MASKS)
def test_a_mask_that_is_none_of_the_rows_is_refused_and_changes_nothing(
    take_rows: Any, rows: Any, what: str
) -> None:
    model = tiny_model(ARGS["delta"])
    message = f"rows must be a mask of booleans with 2 entries, .*, and is {what}"
    with torch.no_grad(), model.streaming(2):
        model.forward_text(random_codes(num_frames=13))
        before = ttt.get_state(model, whole=True)
        with pytest.raises(ValueError, match=message):
            take_rows(model, rows)
        after = ttt.get_state(model, whole=True)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_there_is_not_is_refused(row: int) -> None:
    model = tiny_model(ARGS["delta"])
    with model.streaming(2):
        kept = ttt.get_row(model, 0, whole=True)
        for take_row in (
            lambda: ttt.reset(model, [0, row]),
            lambda: ttt.get_row(model, row, whole=True),
            lambda: ttt.set_row(model, row, kept, whole=True),
            lambda: ttt.row_problem(model, row, kept, whole=True),
        ):
            with pytest.raises(ValueError, match=f"no row {row}: the stream has 2, from 0 on"):
                take_row()


def test_rows_are_of_a_model_that_streams_and_has_ttt() -> None:
    with pytest.raises(ValueError, match=r"Linear has no TTT to use: give a model of `build_model"):
        ttt.use_in_rows(torch.nn.Linear(2, 2), torch.tensor([True]))
    model = tiny_model(ARGS["delta"])
    for take_rows in (ttt.reset, ttt.use_in_rows, ttt.clear_rows):
        with pytest.raises(ValueError, match="not streaming"):
            take_rows(model, torch.tensor([True]))
    with pytest.raises(ValueError, match="not streaming"):
        ttt.clear_rows(torch.nn.Linear(2, 2), torch.tensor([True]))
