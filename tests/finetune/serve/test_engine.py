"""Several conversations in one batch: each is as if it were alone, from its first frame on."""

from typing import Any

import numpy as np
import pytest
import torch
from data_tools import speech_like, tiny_mimi, tiny_tokenizer
from helpers import tiny_args, tiny_delta_args, tiny_linear_args, tiny_model

import ttt
from finetune.data import Codec
from finetune.errors import UserError
from finetune.serve import open_engine
from ttt import TTTLMModel
from ttt.state import _fields

ARGS: dict[str, Any] = {
    "sum": tiny_args(),
    "delta": tiny_delta_args(),
    "linear": tiny_linear_args(),
    "mlp": tiny_linear_args(method="mlp", base_lr=0.4, use_rope=True),
}
FRAME_SAMPLES = 1920


def parts(rule: str = "sum", **lm: Any) -> tuple[TTTLMModel, Codec]:
    usual: dict[str, Any] = {"card": 32, "text_card": 40, "norm": "rms_norm_f32"}
    usual["positional_embedding"] = "rope"
    model = tiny_model(ARGS[rule], dtype=torch.float32, **usual | lm)
    codec = Codec(tiny_mimi(), tiny_tokenizer(), moshi_codebooks=4, user_codebooks=4)
    return model, codec


def speech(num_frames: int, seed: int) -> np.ndarray:
    """Frames [num_frames, FRAME_SAMPLES] of a user's voice."""
    audio = speech_like(num_frames * 0.08, 24000, seed=seed, channels=1)
    return audio[:, 0].reshape(num_frames, FRAME_SAMPLES)


def engine_of(model: TTTLMModel, codec: Codec, max_users: int) -> Any:
    return open_engine(model, codec, max_users=max_users, temperature=0, text_temperature=0)


def alone(model: TTTLMModel, codec: Codec, frames: np.ndarray, **how: Any) -> list[Any]:
    with engine_of(model, codec, 1) as engine:
        row = engine.join(**how)
        return [engine.step({row.index: frame})[row.index] for frame in frames]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [s.text_token for s in found] == [s.text_token for s in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.audio, b.audio, atol=2e-5)


BY_DEFAULT = ("delta", "linear")
"""`sum` keeps its rows as `delta` does, and `mlp` as `linear`."""
every_rule = pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[] if r in BY_DEFAULT else pytest.mark.slow) for r in ARGS]
)


@every_rule
def test_rows_that_join_wait_and_leave_are_as_if_alone(rule: str) -> None:
    model, codec = parts(rule)
    voices = {name: speech(18, seed) for seed, name in enumerate("abcd")}
    expected = {name: alone(model, codec, frames) for name, frames in voices.items()}
    assert len({tuple(s.text_token for s in said) for said in expected.values()}) == 4

    said: dict[str, list[Any]] = {name: [] for name in voices}
    rng = np.random.default_rng(0)
    with engine_of(model, codec, 3) as engine:
        rows: dict[str, Any] = {"a": engine.join()}
        for tick in range(42):
            if tick == 4:
                rows["b"], rows["c"] = engine.join(), engine.join()
                assert engine.join() is None
            if tick == 13:
                # Gone in the middle, and another takes the place at once.
                engine.leave(rows.pop("c"))
                rows["d"] = engine.join()
            talking = [name for name in rows if len(said[name]) < 18 and rng.random() < 0.7]
            frames = {rows[name].index: voices[name][len(said[name])] for name in talking}
            for name in talking if (spoken := engine.step(frames)) else []:
                said[name].append(spoken[rows[name].index])
    for name in "abd":
        assert_same(said[name], expected[name])
    assert_same(said["c"], expected["c"][: len(said["c"])])


def test_what_is_streamed_is_what_a_whole_forward_pass_computes() -> None:
    """Far beyond attention's window, and Mimi's, as at first."""
    check_against_whole(num_frames=75)


@pytest.mark.slow
def test_beyond_3000_frames_too() -> None:
    check_against_whole(num_frames=3200)


def check_against_whole(num_frames: int) -> None:
    model, codec = parts("delta", context=12)
    frames = speech(num_frames, 5)
    logits, codes, tokens, audio = [], [], [], []
    with engine_of(model, codec, 2) as engine:
        row = engine.join()
        look, step = engine.generator.on_text_logits_hook, engine.generator.step

        def hook(values: Any) -> None:
            look(values)
            logits.append(values[row.index, 0, 0].clone())

        def recorded(user: Any) -> Any:
            codes.append(user[row.index])
            tokens.append(step(user)[row.index])
            return tokens[-1].new_zeros(2, *tokens[-1].shape).copy_(tokens[-1])

        engine.generator.on_text_logits_hook, engine.generator.step = hook, recorded
        for frame in frames:
            audio.append(engine.step({row.index: frame})[row.index].audio)
    # The first step hears nothing, and what it says comes with the next.
    said, user = torch.cat(tokens[1:], dim=1), torch.cat(codes[1:], dim=1)
    whole = torch.from_numpy(frames).view(1, 1, -1)
    # Where two codes are as near as rounding can tell, either may be heard.
    assert (user != codec._encode_rows(whole[0])[0, :4]).float().mean() < 1e-3
    decoded = codec_decode(codec, said[None, 1:])
    np.testing.assert_allclose(np.concatenate(audio), decoded, atol=2e-5)
    with torch.no_grad():
        expected = model(torch.cat([said, user])[None]).text_logits[0, 0]
    torch.testing.assert_close(torch.stack(logits)[:num_frames], expected, atol=2e-4, rtol=0)


def codec_decode(codec: Codec, codes: torch.Tensor) -> np.ndarray:
    return codec.decode(codes)[0, 0].numpy()


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_ttt_is_switched_for_one_row(rule: str) -> None:
    model, codec = parts(rule)
    frames = speech(24, 1)
    with_ttt, without = alone(model, codec, frames), alone(model, codec, frames, ttt_on=False)
    with ttt.without_ttt(model):
        assert_same(without, alone(model, codec, frames))
    with engine_of(model, codec, 2) as engine:
        on, off = engine.join(), engine.join(ttt_on=False)
        said = [engine.step({0: frame, 1: frame}) for frame in frames]
        changes = engine.changes()
    assert_same([s[on.index] for s in said], with_ttt)
    assert_same([s[off.index] for s in said], without)
    assert [s.text_token for s in with_ttt] != [s.text_token for s in without]
    for change in changes.values():
        assert change[on.index] > 1e-4 and change[off.index] < 1e-6


def test_a_row_forgets_alone_and_now_and_then() -> None:
    model, codec = parts("delta")
    with engine_of(model, codec, 2) as engine:
        kept, forgetful = engine.join(), engine.join(reset_every_frames=10)
        for index, frame in enumerate(speech(25, 2)):
            engine.step({0: frame, 1: frame})
            for one, other in (
                (c[kept.index], c[forgetful.index]) for c in engine.changes().values()
            ):
                if 5 < index < 10:
                    assert one == pytest.approx(other) and one > 0
                elif index in (10, 20):
                    assert one > 0 and other == 0
                elif index in (19, 24):
                    assert other > 0 and one != pytest.approx(other)
        engine.forget(kept)
        assert all(change[kept.index] == 0 for change in engine.changes().values())
        assert all(change[forgetful.index] > 0 for change in engine.changes().values())


@pytest.mark.parametrize("rule", ARGS)
def test_what_a_cuda_graph_reads_stays_where_it_is(rule: str) -> None:
    """A graph captured in the second step reads and writes the same places ever after: whatever a
    conversation goes through, its state is changed there and never replaced."""
    model, codec = parts(rule)
    frame = speech(1, 1)[0]

    def places(engine: Any) -> dict[str, int]:
        modules = {"": engine.generator, "mimi.": codec.mimi}
        found = {
            prefix + name: getattr(owner, field).data_ptr()
            for prefix, module in modules.items()
            for name, owner, field in _fields(module, whole=True)
            if isinstance(getattr(owner, field), torch.Tensor)
        }
        rows_on = [layer._streaming_state.rows_on for layer in model.ttt_layers.values()]
        return found | {f"rows_on {i}": rows.data_ptr() for i, rows in enumerate(rows_on)}

    with engine_of(model, codec, 2) as engine:
        row = engine.join()
        engine.step({0: frame})
        before = places(engine)
        other = engine.join(ttt_on=False)
        for heard in ([0, 1], [1], [0], [0, 1], [0]):
            engine.step({index: frame for index in heard})
        kept = ttt.get_row(engine.generator, 0, whole=True)
        engine.forget(row)
        engine.restart(row)
        ttt.set_row(engine.generator, 0, kept, whole=True)
        engine.leave(other)
        for _ in range(8):
            engine.step({0: frame})
        after = places(engine)
    assert before.keys() == after.keys() and len(before) > 50
    moved = {name for name in before if before[name] != after[name]}
    # Both are read outside of graphs.
    assert moved <= {"offsets", "mimi.downsample.conv.first"}


def test_a_model_whose_attention_has_no_window_is_refused() -> None:
    model, codec = parts("sum", context=None)
    with pytest.raises(UserError, match="attention has no window"), engine_of(model, codec, 1):
        pass


def test_a_row_that_has_become_nan_spoils_no_other() -> None:
    model, codec = parts("sum")
    frames = speech(12, 3)
    expected = alone(model, codec, frames)
    with open_engine(model, codec, max_users=2, text_temperature=0) as engine:
        assert all(engine.step({0: frame, 1: frame})[0].healthy for frame in frames[:2])
        with torch.no_grad():
            model.ttt_layers[0]._streaming_state.change[1] = float("nan")
        spoken = engine.step({0: frames[2], 1: frames[2]})
        assert spoken[0].healthy and not spoken[1].healthy
        engine.restart(engine.rows[1])
        assert engine.step({0: frames[3], 1: frames[0]})[1].healthy
    with engine_of(model, codec, 2) as engine:
        # What a broken caller leaves in the caches does not reach the next one.
        for frame in frames:
            engine.step({1: frame})
        for layer in model.transformer.layers:
            layer.self_attn._streaming_state.kv_cache.cache[:, 1] = float("nan")
        engine.leave(engine.rows[1])
        assert_same([engine.step({1: frame})[1] for frame in frames], expected)


def test_a_row_whose_voice_is_not_finite_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codec = parts("sum")
    with engine_of(model, codec, 2) as engine:
        voice = speech(1, 1)[0]
        assert engine.step({0: voice, 1: voice})[1].healthy
        decode = engine.codec.mimi.decode

        def broken(codes: torch.Tensor) -> torch.Tensor:
            audio = decode(codes)
            audio[1, 0, 7] = float("nan")
            return audio

        monkeypatch.setattr(engine.codec.mimi, "decode", broken)
        spoken = engine.step({0: voice, 1: voice})
        assert (spoken[0].healthy, spoken[1].healthy) == (True, False)
