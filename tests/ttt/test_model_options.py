"""Single options of a model with TTT: where and when it learns, what is measured, and mistakes."""

import dataclasses
import re
from typing import Any, ClassVar

import pytest
import torch
from helpers import (
    random_codes,
    tiny_args,
    tiny_delta_args,
    tiny_linear_args,
    tiny_lm_kwargs,
    tiny_model,
    tiny_relative_args,
)
from test_model import (
    ARGS,
    BY_DEFAULT,
    IN_PLACE,
    LINEAR,
    assert_same,
    each_of,
    stock_copy,
    stream,
    text_logits,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ttt import TTTArgs, TTTLMModel, build_model, measuring, ops, without_ttt


def test_the_invariants_are_tested_by_default_for_what_is_shipped() -> None:
    """For all of it in one: each option may be right with others, and wrong with these."""
    sizes = {"enabled", "start_layer", "layer_frequency", "chunk_size"}
    options: Any = {f.name: f.default for f in dataclasses.fields(TTTArgs) if f.name not in sizes}
    assert dataclasses.replace(tiny_args(), **options) in [ARGS[name] for name in BY_DEFAULT]


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


def measured_of(model: TTTLMModel, *all_codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is measured of some passes, one after the other."""
    with torch.no_grad(), measuring(model) as measured:
        for codes in all_codes:
            model(codes)
    return measured


@each_of(ARGS)
def test_padding_is_not_measured(args: TTTArgs) -> None:
    """The last code of a recording is read two frames later: as delayed, and for the next one."""
    model, codes = tiny_model(args), random_codes(num_frames=20)
    codes[:, :, 18:] = -1
    whole = measured_of(model, codes)
    padded = measured_of(model, torch.nn.functional.pad(codes, (0, 9), value=-1))
    assert padded.keys() == whole.keys() and whole["layer_00/effect"] > 0
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=0)


@each_of(ARGS)
def test_where_no_frame_reads_what_was_learned_nothing_is_measured(args: TTTArgs) -> None:
    model, codes = tiny_model(args), random_codes()
    short = codes.clone()
    # Its last code is read at frame 4, and the first chunk ends there.
    short[:, :, 3:] = -1
    effects = {name for name in measured_of(model, codes) if name.endswith("/effect")}
    found = measured_of(model, short)
    # A mini-batch's own frames read it, and of five frames the first four fill one.
    reads_at_once = args.method != "in_place"
    assert found.keys() == (measured_of(model, codes).keys() if reads_at_once else set())
    assert all(value.isfinite() for value in found.values())
    if not reads_at_once:
        # Where one micro-batch has nothing to measure, the next one may.
        assert measured_of(model, short, codes).keys() >= effects
    very_short = short.clone()
    very_short[:, :, 1:] = -1
    assert measured_of(model, very_short).keys() == (effects if reads_at_once else set())


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


two_methods = pytest.mark.parametrize("args", [ARGS["delta"], ARGS["mlp"]], ids=["delta", "mlp"])


@two_methods
def test_ttt_stays_off_after_a_block_within_a_block(args: TTTArgs) -> None:
    model, codes = tiny_model(args), random_codes()
    on = text_logits(model, codes)
    with without_ttt(model):
        off = text_logits(model, codes)
        with pytest.raises(RuntimeError), without_ttt(model):
            raise RuntimeError
        assert torch.equal(text_logits(model, codes), off)
    assert torch.equal(text_logits(model, codes), on) and not torch.equal(on, off)


@two_methods
def test_a_block_measures_on_after_one_within_it(args: TTTArgs) -> None:
    model = tiny_model(args)
    with measuring(model) as outer:
        with measuring(model) as inner:
            text_logits(model, random_codes(seed=2))
        with measuring(model, enabled=False) as nothing:
            text_logits(model, random_codes(seed=3))
        text_logits(model, random_codes())
    with measuring(model) as expected:
        text_logits(model, random_codes())
    assert outer == expected and outer != inner and not nothing


@pytest.mark.parametrize("mode", ["wrong", "", "true", None, 1])
def test_what_is_kept_for_the_backward_pass_is_one_of_three(mode: Any) -> None:
    message = f"gradient_checkpointing: must be false, true or selective, got {mode!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(tiny_lm_kwargs(), tiny_args(), device="meta", gradient_checkpointing=mode)


def test_layers_are_where_they_are_configured() -> None:
    args = TTTArgs(enabled=True)
    assert args.layers(32) == [5, 11, 17, 23, 29]
    model = tiny_model(tiny_args(start_layer=1, layer_frequency=1))
    assert list(model.ttt_layers) == [1, 2]


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
