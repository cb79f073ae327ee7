"""What must always hold for a model with TTT (docs/mathematics.md lists the invariants)."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers import (
    fast_state,
    moshi_like,
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_lm_kwargs,
    tiny_model,
    tiny_relative_args,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from moshi.models.lm import LMGen, LMModel

import ttt
from ttt import TTTArgs, TTTLMModel, build_model, state_bytes, ttt_parameters
from ttt.registry import METHODS

IN_PLACE: dict[str, Any] = {
    "text": tiny_args(),
    "input": tiny_args(target="input"),
    "hidden": tiny_args(target="hidden"),
    "long kernel": tiny_args(conv_kernel_size=3, conv_lookahead=1),
    "bounded": tiny_args(max_delta_norm=0.5),
    "decay": tiny_args(state_decay=0.8),
    "delta": tiny_delta_args(),
    "relative": tiny_relative_args(),
    "relative, bounded, decay": tiny_relative_args(max_delta_norm=0.5, state_decay=0.8),
    "relative, hidden, no lookahead": tiny_relative_args(target="hidden", conv_lookahead=0),
    "relative delta": tiny_relative_args(write="delta", target="hidden"),
    "delta, input, decay": tiny_delta_args(target="input", state_decay=0.8),
    "delta, cut": tiny_relative_args(write="delta", chunk_edge="cut"),
    "delta, long kernel": tiny_relative_args(write="delta", conv_kernel_size=4, conv_lookahead=2),
    "delta, input, long kernel, decay": tiny_relative_args(
        write="delta", target="input", conv_kernel_size=4, conv_lookahead=2, state_decay=0.8
    ),
    "carried sum": tiny_args(chunk_edge="carry", max_delta_norm=0.5, state_decay=0.8),
}
LINEAR: dict[str, Any] = {
    "linear": tiny_linear_args(),
    "linear with rope": tiny_linear_args(use_rope=True),
    "linear, one wide head": tiny_linear_args(num_heads=1, qk_conv_kernel_size=2),
    "linear without convolution": tiny_linear_args(qk_conv_kernel_size=1),
    "linear, one wide head, without convolution": tiny_linear_args(
        num_heads=1, qk_conv_kernel_size=1
    ),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.4),
    "mlp with rope": tiny_linear_args(method="mlp", base_lr=0.4, use_rope=True),
    "mlp without convolution": tiny_linear_args(method="mlp", base_lr=0.4, qk_conv_kernel_size=1),
}
ARGS = IN_PLACE | LINEAR
BY_DEFAULT = {
    "relative delta",
    "text",
    "relative, hidden, no lookahead",
    "carried sum",
    "delta, input, long kernel, decay",
    "linear, one wide head, without convolution",
    "mlp with rope",
}
"""Every option has each of its values in one of these. All combinations of `ARGS`: `-m slow`."""


def each_of(args: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(
        "args",
        [
            pytest.param(value, id=name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)
            for name, value in args.items()
        ],
    )


INVARIANTS: list[Any] = []
"""What must hold for every method, as functions of its `TTTArgs`."""


def every_method(test: Any) -> Any:
    """Run an invariant for each of `ARGS`; a new method is tested by being added there."""
    INVARIANTS.append(test)
    return each_of(ARGS)(test)


def test_every_method_is_tested() -> None:
    assert {args.method for args in ARGS.values()} == METHODS.keys()


CHOICES = ["method", "write", "lr_scale", "target", "carries", "use_rope"]


@pytest.mark.parametrize("option", CHOICES)
def test_each_choice_is_tested_by_default(option: str) -> None:
    chosen = {name: getattr(args, option) for name, args in ARGS.items()}
    assert {chosen[name] for name in BY_DEFAULT} == {*chosen.values()}


def stock_copy(model: TTTLMModel, **lm_overrides: Any) -> LMModel:
    """The stock model with the same weights and no TTT."""
    stock = LMModel(**tiny_lm_kwargs(**lm_overrides), device="cpu", dtype=model.dtype).eval()
    own = ttt_parameters(model)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k not in own})
    return stock


def text_logits(model: TTTLMModel, codes: torch.Tensor) -> torch.Tensor:
    """[B, T, card]: the text logits of the sequence read as it is, without delays."""
    with torch.no_grad():
        return model.forward_text(codes)[1][:, 0]


def stream(
    model: TTTLMModel, codes: torch.Tensor, lengths: int | list[int]
) -> tuple[torch.Tensor, list[Any]]:
    """The same, in calls of the given numbers of frames."""
    with torch.no_grad(), model.streaming(codes.shape[0]):
        parts = [model.forward_text(part)[1][:, 0] for part in codes.split(lengths, dim=2)]
        states = [x for module in model.ttt_layers.values() for x in fast_state(module)]
    return torch.cat(parts, dim=1), states


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_method
def test_untrained_ttt_is_the_plain_model(args: TTTArgs) -> None:
    model = tiny_model(args, trained=False)
    codes = random_codes()
    ours, stock = model(codes), stock_copy(model)(codes)
    torch.testing.assert_close(ours.text_logits, stock.text_logits, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-12, atol=1e-13, equal_nan=True)
    assert torch.equal(ours.mask, stock.mask) and torch.equal(ours.text_mask, stock.text_mask)
    without = tiny_model(TTTArgs(enabled=False), trained=False)
    without.load_state_dict(stock_copy(model).state_dict())
    assert torch.equal(ours.text_logits, without(codes).text_logits)


@every_method
def test_the_future_never_changes_the_past(args: TTTArgs) -> None:
    # A wide attention window, so that whatever leaks would be seen.
    model = tiny_model(args, context=100)
    codes = random_codes(batch=1)
    before = text_logits(model, codes)
    for t in range(codes.shape[2]):
        changed = codes.clone()
        changed[:, :, t] = (changed[:, :, t] + 1) % 20
        after = text_logits(model, changed)
        assert_same(after[:, :t], before[:, :t], 1e-12)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-6


SPLIT_FRAMES = 23
READ: dict[str, Any] = {}


def read_whole_and_by_frame(args: TTTArgs) -> Any:
    """A model, what it makes of a sequence at once, and its states after single frames: made once
    for all splits."""
    if (key := repr(args)) not in READ:
        # A streaming KV cache holds `context` frames, so no call may be longer than that.
        model = tiny_model(args, context=SPLIT_FRAMES)
        codes = random_codes(num_frames=SPLIT_FRAMES)
        states = stream(model, codes, [1] * SPLIT_FRAMES)[1]
        READ[key] = model, codes, text_logits(model, codes), states
    return READ[key]


@every_method
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_split_into_calls_gives_the_same(args: TTTArgs, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, SPLIT_FRAMES - 1)))
    edges = [0, *sorted(cuts), SPLIT_FRAMES]
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    model, codes, whole, states_by_frame = read_whole_and_by_frame(args)
    outputs, states = stream(model, codes, lengths)
    assert_same(outputs, whole)
    for a, b in zip(states, states_by_frame, strict=True):
        assert_same(a, b)


@every_method
def test_streaming_equals_the_whole_sequence_with_moshis_own_norm_and_positions(
    args: TTTArgs,
) -> None:
    model = tiny_model(
        args, dtype=torch.float32, **{k: moshi_like()[k] for k in ("norm", "positional_embedding")}
    )
    codes = random_codes(num_frames=60)
    whole = text_logits(model, codes)
    assert_same(stream(model, codes, [1] * 60)[0], whole, 1e-4)
    assert (
        whole
        - text_logits(
            stock_copy(model, **{k: moshi_like()[k] for k in ("norm", "positional_embedding")}),
            codes,
        )
    ).abs().max() > 1e-2


@every_method
def test_every_row_equals_its_run_alone(args: TTTArgs) -> None:
    model = tiny_model(args)
    codes = random_codes(batch=3)
    together, _ = stream(model, codes, [1] * 23)
    for row in range(3):
        assert_same(together[row], stream(model, codes[row : row + 1], [1] * 23)[0][0])
        assert_same(together[row], text_logits(model, codes[row : row + 1])[0])


@every_method
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_paused_and_restarted_rows_touch_no_other(args: TTTArgs, data: st.DataObject) -> None:
    """Three rows, each paused and restarted at random, equal three streams run alone."""
    model = tiny_model(args)
    streams = [random_codes(batch=1, num_frames=40, seed=row)[0] for row in range(3)]
    position = [0] * 3
    heard: list[list[Any]] = [[] for _ in range(3)]
    spoken: list[list[Any]] = [[] for _ in range(3)]
    with torch.no_grad(), model.streaming(3):
        for step in range(30):
            runs = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
            restarts = data.draw(
                st.lists(st.sampled_from([False] * 5 + [True]), min_size=3, max_size=3)
            )
            if step and any(restarts):
                model.reset_streaming(torch.tensor(restarts))
                for row in range(3):
                    if restarts[row]:
                        heard[row], spoken[row] = [], []
            model.set_exec_mask(torch.tensor(runs))
            frame = torch.stack([streams[row][:, position[row]] for row in range(3)])[:, :, None]
            out = model.forward_text(frame)[1][:, 0, 0]
            for row in range(3):
                if runs[row]:
                    heard[row].append(frame[row])
                    spoken[row].append(out[row])
                    position[row] += 1
    for row in range(3):
        if heard[row]:
            alone = text_logits(model, torch.cat(heard[row], dim=1)[None])[0]
            assert_same(torch.stack(spoken[row]), alone)


@every_method
def test_rows_at_different_frames_take_many_frames_a_call(args: TTTArgs) -> None:
    model = tiny_model(args, context=40)
    codes = random_codes(num_frames=30)
    with torch.no_grad(), model.streaming(2):
        model.set_exec_mask(torch.tensor([True, False]))
        first = model.forward_text(codes[:, :, :3])[1][:1, 0]
        model.set_exec_mask(torch.tensor([True, True]))
        shifted = torch.stack([codes[0, :, 3:20], codes[1, :, :17]])
        both = model.forward_text(shifted)[1][:, 0]
    assert_same(torch.cat([first[0], both[0]]), text_logits(model, codes[:1, :, :20])[0])
    assert_same(both[1], text_logits(model, codes[1:, :, :17])[0])


@every_method
def test_a_row_that_is_switched_off_is_the_model_without_ttt(args: TTTArgs) -> None:
    """Nothing is learned in it, and the row beside it has its TTT. Switched on, it learns."""
    model, codes, spoken = tiny_model(args, context=60), random_codes(), []
    on = text_logits(model, codes)
    with torch.no_grad(), model.streaming(2):
        with ttt.without_ttt(model):
            off = model.forward_text(codes)[1][:, 0]
        switched_on = model.forward_text(codes)[1][:, 0]
    with torch.no_grad(), model.streaming(2):
        fast = [w for m in model.ttt_layers.values() for w in m._streaming_state.fast_weights()]
        start = [weight[0].clone() for weight in fast]
        for frame in codes.split(1, dim=2):
            ttt.use_in_rows(model, torch.tensor([False, True]))
            spoken.append(model.forward_text(frame)[1][:, 0])
        assert all(torch.equal(now[0], was) for now, was in zip(fast, start, strict=True))
        ttt.use_in_rows(model, torch.tensor([True, True]))
        assert_same(model.forward_text(codes)[1][0], switched_on[:1])
    assert_same(torch.cat(spoken, dim=1), torch.stack([off[0], on[1]]))
    assert (on[0] - off[0]).abs().max() > 1e-3


@every_method
def test_inference_never_changes_a_weight(args: TTTArgs) -> None:
    model = tiny_model(args)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    codes = random_codes()
    model(codes)
    stream(model, codes, [7, 1, 1, 1, 13])
    with model.streaming(2):
        text_logits(model, codes[:, :, :9])
        model.reset_streaming()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@every_method
def test_a_restarted_stream_remembers_nothing(args: TTTArgs) -> None:
    model = tiny_model(args, context=20)
    codes = random_codes(num_frames=12)
    with torch.no_grad(), model.streaming(2):
        first = model.forward_text(codes)[1]
        model.reset_streaming()
        assert torch.equal(model.forward_text(codes)[1], first)


@every_method
@pytest.mark.parametrize("lengths", [1, 4])
def test_frames_past_the_end_are_streamed_as_they_are_trained(args: TTTArgs, lengths: int) -> None:
    """A recording ends in mid-chunk; what is read after it sees what was written before."""
    model = tiny_model(args, context=40)
    codes = random_codes(num_frames=24)
    codes[1, :, 9:13] = -1
    assert_same(stream(model, codes, lengths)[0], text_logits(model, codes))


@every_method
def test_padding_and_an_open_chunk_change_nothing(args: TTTArgs) -> None:
    model = tiny_model(args)
    codes = random_codes(num_frames=18)
    padded = torch.nn.functional.pad(codes, (0, 9), value=-1)
    assert_same(text_logits(model, padded)[:, :18], text_logits(model, codes), 1e-12)


@every_method
def test_every_ttt_parameter_learns(args: TTTArgs) -> None:
    """From the untrained start: first the one that starts at zero, the others once it is not."""
    model = tiny_model(args, trained=False).train()
    # So small a step that no norm is bounded yet: a bounded update does not feel the gate.
    optimizer = torch.optim.SGD(ttt_parameters(model).values(), lr=0.01)
    assert {name.split(".")[2] for name in ttt_parameters(model)} == {"0", "2"}
    starts = ("out_proj", "target_conv" if args.lr_scale == "none" else "target_gate")
    for step in range(2):
        optimizer.zero_grad()
        model(random_codes()).text_logits.square().mean().backward()
        for name, parameter in ttt_parameters(model).items():
            if step == 1 or name.endswith(starts):
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        optimizer.step()


@every_method
def test_stock_generation_runs_the_model_and_equals_the_whole_sequence(args: TTTArgs) -> None:
    """Greedy `LMGen`, one frame at a time: its tokens are those that the parallel pass prefers."""
    model = tiny_model(args, context=40)
    user = random_codes(num_frames=24, batch=2)[:, 5:]
    generator = LMGen(model, use_sampling=False)
    with generator.streaming(2):
        frames = [generator.step(user[:, :, t : t + 1]) for t in range(24)]
    tokens = torch.cat([frame for frame in frames if frame is not None], dim=2)
    num_frames = tokens.shape[2]
    # What the user says at step t is read at position t; the delayed streams one later.
    heard = torch.stack(
        [user[:, 0, 1 : num_frames + 1]] + [user[:, k, 1 : num_frames + 1] for k in range(1, 4)],
        dim=1,
    )
    output = model(torch.cat([tokens, heard], dim=1))
    assert torch.equal(output.text_logits[:, 0].argmax(-1), tokens[:, 0])
    for k in range(4):
        valid = output.mask[:, k]
        assert torch.equal(output.logits[:, k].argmax(-1)[valid], tokens[:, 1 + k][valid])


@every_method
def test_state_bytes_counts_what_streaming_allocates(args: TTTArgs) -> None:
    model = tiny_model(args, dtype=torch.float32)
    with model.streaming(3):
        allocated = sum(
            t.numel() * t.element_size()
            for module in model.ttt_layers.values()
            for t in module._streaming_state.tensors().values()
        )
    assert state_bytes(model, 3) == allocated


@every_method
def test_attention_windows_are_where_they_are_configured(
    args: TTTArgs, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame is forgotten where only attention could have carried it."""
    args = dataclasses.replace(args, attention_context=2)
    with caplog.at_level("INFO"):
        model = build_model(tiny_lm_kwargs(), args, device="meta", attention_context=7)
    assert [layer.self_attn.context for layer in model.transformer.layers] == [2, 7, 2]
    assert model.context == 7
    assert "attention sees 2 frames in the 2 layers" in caplog.text
    assert {layer.self_attn.context for layer in model.depformer.layers} == {None}
    model = tiny_model(args, context=5)
    codes = random_codes(num_frames=30)
    assert_same(stream(model, codes, [1] * 30)[0], text_logits(model, codes))
