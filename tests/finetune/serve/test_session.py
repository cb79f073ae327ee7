"""Where a conversation stands, as a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from test_engine import alone, engine_of, every_rule, parts, speech

from finetune.data.codec import Codec
from finetune.errors import UserError
from finetune.serve.options import Part
from finetune.serve.session import Identity, decode, identify, pack, unpack
from ttt import TTTLMModel

ME = Identity("run/checkpoint_000007", "0123456789abcdef")


def saved(
    model: TTTLMModel,
    codec: Codec,
    frames: np.ndarray,
    part: Part = "all",
    max_users: int = 1,
    row: int = 0,
) -> bytes:
    with engine_of(model, codec, max_users) as engine:
        for frame in frames:
            engine.step({row: frame})
        return pack(engine, engine.rows[row], ME, part)


def assert_same(one: bytes, other: bytes) -> None:
    """To the bit."""
    left, right = load(one), load(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@every_rule
def test_another_day_it_goes_on_to_the_bit(rule: str) -> None:
    model, codec = parts(rule)
    frames = speech(24, 1)
    whole = alone(model, codec, frames)
    content = saved(model, codec, frames[:13])
    with engine_of(model, codec, 1) as engine:
        row = engine.join()
        # What was said in the row before makes no difference.
        engine.step({0: frames[3]})
        assert unpack(engine, row, ME, content, "it") == "all"
        assert row.num_frames == 13
        for frame, expected in zip(frames[13:], whole[13:], strict=True):
            spoken = engine.step({0: frame})[0]
            assert spoken.text_token == expected.text_token
            assert np.array_equal(spoken.audio, expected.audio)


def test_a_session_is_read_while_the_depth_transformer_is_in_a_step() -> None:
    """Its state exists within a step alone, and files are read beside it."""
    model, codec = parts("delta")
    with engine_of(model, codec, 1) as engine:
        row = engine.join()
        assert row is not None
        content = pack(engine, row, ME, "all")
        with model.depformer.streaming(1):
            assert decode(engine, ME, content, "it").part == "all"


def test_a_row_of_one_batch_goes_on_in_another_row_of_another_batch() -> None:
    model, codec = parts("delta")
    frames = speech(20, 2)
    whole = alone(model, codec, frames)
    content = saved(model, codec, frames[:11], max_users=2, row=1)
    with engine_of(model, codec, 3) as engine:
        unpack(engine, engine.rows[2], ME, content, "it")
        assert_same(pack(engine, engine.rows[2], ME, "all"), content)
        tokens = [engine.step({2: frame})[2].text_token for frame in frames[11:]]
    assert tokens == [spoken.text_token for spoken in whole[11:]]


def test_nothing_of_a_caller_is_in_the_session_of_the_next() -> None:
    model, codec = parts("linear")
    with engine_of(model, codec, 1) as engine:
        unused = load(pack(engine, engine.rows[0], ME, "all"))
        for frame in speech(7, 1):
            engine.step({0: frame})
        engine.leave(engine.rows[0])
        next_one = load(pack(engine, engine.rows[0], ME, "all"))
    assert [name for name in unused if not torch.allclose(unused[name], next_one[name])] == []


def test_memory_alone_is_what_ttt_has_learned() -> None:
    model, codec = parts("delta")
    frames = speech(16, 3)
    content = saved(model, codec, frames, part="memory")
    assert len(content) < 0.5 * len(saved(model, codec, frames))
    with engine_of(model, codec, 2) as engine:
        unpack(engine, engine.rows[1], ME, content, "it")
        for change in engine.changes().values():
            assert change[0] == 0 and change[1] > 1e-4
        assert engine.rows[1].num_frames == 0 and engine.step({1: frames[0]})[1].healthy


def change(content: bytes, name: str, value: torch.Tensor | None) -> bytes:
    """A session that somebody has altered."""
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    tensors = load(content)
    if value is None:
        del tensors[name]
    elif isinstance(value, float):
        tensors[name].view(-1)[0] = value
    else:
        tensors[name] = value
    return save(tensors, metadata)


CHANGE = "moshi.lm_model.transformer.layers.0.gating.change"
PENDING = "moshi.lm_model.transformer.layers.0.gating.num_pending"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (PENDING, torch.tensor(5), "num_pending is out of range"),
        (PENDING, torch.tensor(-1), "num_pending is out of range"),
        (PENDING, torch.tensor(1.0), "num_pending is float32"),
        (PENDING, None, r"not of this model: it lacks lm_model\S*num_pending\."),
        ("moshi.cache", torch.full((9, 3), 1000), "tokens"),
        # One more than the last code, and than the last piece of text: what a stream begins with.
        ("moshi.cache", torch.full((9, 3), 32), "moshi.cache is out of range"),
        ("moshi.cache", torch.full((9, 3), 40), "tokens"),
        ("moshi.cache", torch.tensor(3), "moshi.cache|cache is int64"),
        ("moshi.offsets", torch.tensor(-3), "out of range"),
        (CHANGE, float("nan"), "change holds NaN or infinity"),
        (CHANGE, float("inf"), "change holds NaN or infinity"),
        ("elsewhere", torch.tensor(1), "entries of no module"),
    ],
)
def test_an_altered_session_is_refused_and_changes_nothing(
    name: str, value: torch.Tensor | None, message: str
) -> None:
    model, codec = parts("sum")
    frames = speech(9, 4)
    content = saved(model, codec, frames)
    with engine_of(model, codec, 1) as engine:
        engine.step({0: frames[0]})
        before = pack(engine, engine.rows[0], ME, "all")
        with pytest.raises(UserError, match=message):
            unpack(engine, engine.rows[0], ME, change(content, name, value), "it")
        for broken in (b"", b"x" * 100, content[:-5], b"\xff" * 8 + content[8:]):
            with pytest.raises(UserError, match=r"^it is (no|a damaged) session"):
                unpack(engine, engine.rows[0], ME, broken, "it")
        assert_same(pack(engine, engine.rows[0], ME, "all"), before)


def test_a_session_with_places_that_are_not_filled_ends_no_other_call() -> None:
    model, codec = parts("sum")
    frames = speech(6, 4)
    expected = alone(model, codec, frames)
    content = saved(model, codec, frames)
    for never_filled in (-1, -2):
        places = torch.full_like(load(content)["moshi.cache"], never_filled)
        with engine_of(model, codec, 2) as engine:
            unpack(engine, engine.rows[0], ME, change(content, "moshi.cache", places), "it")
            for frame, other in zip(frames, expected, strict=True):
                spoken = engine.step({0: frame, 1: frame})
                assert spoken[1].text_token == other.text_token
                np.testing.assert_allclose(spoken[1].audio, other.audio, atol=2e-5)


def test_the_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    model, codec = parts("sum")
    folder = tmp_path / "run/checkpoints/checkpoint_000007"
    first = identify(model, codec, folder)
    assert first.name == "run/checkpoint_000007"
    assert first == identify(*parts("sum"), folder)
    with torch.no_grad():
        model.transformer.layers[1].gating.linear_in.weight[0, 0] += 1e-3
    assert identify(model, codec, folder).fingerprint != first.fingerprint
