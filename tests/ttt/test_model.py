"""What must always hold for a model with TTT (docs/mathematics.md lists the invariants)."""

import dataclasses
import itertools
from typing import Any, ClassVar

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
from torch.utils._python_dispatch import TorchDispatchMode

from ttt import TTTArgs, TTTLMModel, build_model, measuring, ops, state_bytes, ttt_parameters
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


def test_on_meta_nothing_is_drawn() -> None:
    """There is nothing to fill, and of a Moshi 7B it took most of the time."""

    class Drawn(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Drawn() as drawn:
        build_model(tiny_lm_kwargs(), tiny_args(), device="meta")
    assert drawn.names and not [n for n in drawn.names if "normal" in n or "uniform" in n]


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


@each_of(IN_PLACE)
def test_trained_ttt_changes_the_output_beyond_the_first_chunk_only(args: TTTArgs) -> None:
    model = tiny_model(args)
    codes = random_codes()
    difference = (text_logits(model, codes) - text_logits(stock_copy(model), codes)).abs()
    assert difference[:, :5].max() < 1e-12
    assert difference[:, 5:].amax(dim=2).min() > 1e-3


@pytest.mark.parametrize(
    "args",
    [
        tiny_args(learning_rate=0.0),
        tiny_relative_args(learning_rate=0.0),
        tiny_args(chunk_size=23),
        tiny_delta_args(chunk_size=23),
        tiny_relative_args(chunk_size=23),
    ],
)
def test_no_inner_learning_or_a_single_chunk_is_the_plain_model(args: TTTArgs) -> None:
    model = tiny_model(args)
    codes = random_codes()
    assert_same(text_logits(model, codes), text_logits(stock_copy(model), codes), 1e-12)


@each_of(LINEAR)
def test_linear_and_mlp_learn_from_the_first_frame_on(args: TTTArgs) -> None:
    """Without inner learning they are not the plain model, but layers that stay as they are."""
    learning = tiny_model(args)
    fixed = tiny_model(dataclasses.replace(args, base_lr=0.0))
    codes = random_codes()
    difference = (text_logits(learning, codes) - text_logits(fixed, codes)).abs().amax(dim=2)
    assert difference.min() > 1e-6 and difference.mean() > 1e-2
    for model, learns in ((learning, True), (fixed, False)):
        # Before the first mini-batch ends, and after the fifth.
        first, *_ = stream(model, codes[:, :, :3], [3])[1]
        last, *_ = stream(model, codes, [10, 10, 3])[1]
        assert ((last - first).norm() > 0.1 * first.norm()) == learns


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


def test_measurements_say_whether_ttt_does_anything() -> None:
    codes = random_codes()
    with torch.no_grad(), measuring(tiny_model(trained=False)) as untrained:
        pass
    assert untrained == {}
    model = tiny_model(tiny_args(max_delta_norm=1e-3))
    with torch.no_grad(), measuring(model) as measured:
        model(codes)
    assert set(measured) == {
        f"layer_{i:02d}/{k}" for i in (0, 2) for k in ("effect", "delta", "clip_rate")
    }
    assert measured["layer_00/clip_rate"] == 1.0
    base = model.ttt_layers[0].base_weight.norm()
    assert_same(measured["layer_00/delta"].double(), 0.5 * 1e-3 / base, 1e-6)
    assert 0 < measured["layer_00/effect"] < 1


@each_of(LINEAR)
def test_measurements_tell_how_well_the_inner_loop_learns(args: TTTArgs) -> None:
    model = tiny_model(args)
    codes = random_codes(num_frames=40)
    with torch.no_grad(), measuring(model) as measured:
        model(codes)
    names = ("effect", "inner_loss_initial", "inner_loss_before", "inner_loss_after")
    assert set(measured) == {f"layer_{i:02d}/{name}" for i in (0, 2) for name in names}
    initial, before, after = (measured[f"layer_00/{name}"] for name in names[1:])
    assert after < before and after < initial
    assert 0 < measured["layer_00/effect"] < 10
    with torch.no_grad(), measuring(model) as short:
        model(codes[:, :, :3])
    assert set(short) == {"layer_00/effect", "layer_02/effect"}


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


@pytest.mark.parametrize(
    ("args", "lm_overrides", "message"),
    [
        (tiny_args(start_layer=3), {}, "beyond the model's last layer, 2"),
        (tiny_args(chunk_size=0), {}, "ttt.chunk_size: must be 1 or more, got 0"),
        (tiny_args(conv_lookahead=2), {}, "ttt.conv_lookahead"),
        (tiny_relative_args(learning_rate=1e-3), {}, "ttt.learning_rate: is 0.001, and with lr_sc"),
        (tiny_args(write="delta"), {}, "ttt.learning_rate: belongs to write: sum"),
        (tiny_args(write_strength=5.0), {}, "ttt.write_strength: belongs to write: delta"),
        (tiny_delta_args(max_delta_norm=1.0), {}, "ttt.max_delta_norm: belongs to write: sum"),
        (
            tiny_delta_args(write_strength=0.0),
            {},
            "ttt.write_strength: must be more than 0, got 0.0",
        ),
        (tiny_args(state_decay=1.5), {}, "ttt.state_decay: must be at most 1, got 1.5"),
        (tiny_args(), {"gating": "none", "depformer_gating": "silu"}, "needs gated MLPs"),
        (tiny_linear_args(start_layer=3), {}, "beyond the model's last layer, 2"),
        (tiny_linear_args(mini_batch_size=1), {}, "ttt.mini_batch_size: must be 2 or more, got 1"),
        (tiny_linear_args(use_rope=True), {"dim": 18}, "ttt.use_rope: needs an even head width"),
        (tiny_linear_args(gate_init=0.0), {}, "ttt.gate_init: must be a number other than 0"),
        (tiny_linear_args(rope_theta=5.0), {}, "ttt.rope_theta: has no effect with use_rope"),
        (tiny_linear_args(chunk_size=8), {}, "ttt.chunk_size: is an option of method in_place"),
        (tiny_args(use_rope=True), {}, "ttt.use_rope: is an option of method linear and mlp"),
        (tiny_args(attention_context=0), {}, "ttt.attention_context: must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(
    args: TTTArgs, lm_overrides: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(tiny_lm_kwargs(**lm_overrides), args, device="meta")


def test_layers_are_where_they_are_configured() -> None:
    args = TTTArgs(enabled=True)
    assert args.layers(32) == [5, 11, 17, 23, 29]
    model = tiny_model(tiny_args(start_layer=1, layer_frequency=1))
    assert list(model.ttt_layers) == [1, 2]


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


def test_rope_counts_positions_inside_the_mini_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Read at once or frame by frame, also when rows are at different frames."""
    seen: list[Any] = []
    rope = ops.rope

    def seeing(x: torch.Tensor, at: torch.Tensor, theta: float) -> torch.Tensor:
        seen.append(at)
        return rope(x, at, theta=theta)

    monkeypatch.setattr(ops, "rope", seeing)
    with caplog.at_level("INFO"):
        model = tiny_model(tiny_linear_args(use_rope=True, mini_batch_size=16), context=300)
    assert caplog.text.count("RoPE") == 1
    codes = random_codes(num_frames=256)
    text_logits(model, codes)
    assert all(torch.equal(at, torch.arange(256)[None] % 16) for at in seen)
    # Queries and keys of two layers.
    assert len(seen) == 4
    seen.clear()
    stream(model, codes, [1] * 256)
    assert [at[:, 0].tolist() for at in seen[::4]] == [[t % 16] * 2 for t in range(256)]
    seen.clear()
    with torch.no_grad(), model.streaming(2):
        model.forward_text(codes[:, :, :3])
        model.reset_streaming(torch.tensor([False, True]))
        model.forward_text(codes[:, :, :14])
    assert torch.equal(seen[-1], (torch.tensor([[3], [0]]) + torch.arange(14)) % 16)


def test_without_rope_nothing_of_it_is_executed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("RoPE is off")

    monkeypatch.setattr(ops, "rope", fail)
    model = tiny_model(tiny_linear_args())
    codes = random_codes()
    text_logits(model, codes)
    stream(model, codes, [1] * 23)
    assert "RoPE" not in caplog.text
