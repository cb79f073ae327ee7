"""Conversations begin so that their chunks end in different frames; nothing else changes."""

import asyncio
import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from data_tools import tiny_mimi, tiny_tokenizer
from helpers import tiny_args, tiny_delta_args, tiny_linear_args, tiny_model
from test_engine import alone, engine_of, speech
from test_server import calling, next_bytes, say_pcm, serving

from finetune.data import Codec
from finetune.serve.calls import FRAME_SEC
from ttt import TTTArgs, TTTLMModel

RULES: dict[str, Any] = {"sum": tiny_args, "delta": tiny_delta_args}


def parts(args: TTTArgs) -> tuple[TTTLMModel, Codec]:
    like: dict[str, Any] = {"norm": "rms_norm_f32", "positional_embedding": "rope"}
    model = tiny_model(args, dtype=torch.float32, card=32, text_card=40, **like)
    return model, Codec(tiny_mimi(), tiny_tokenizer(), moshi_codebooks=4, user_codebooks=4)


class Watched:
    """An engine whose frames tell in which rows the fast weights have changed."""

    def __init__(self, engine: Any, model: TTTLMModel) -> None:
        self.engine, self.model = engine, model
        self.before = self.weights()

    def weights(self) -> list[torch.Tensor]:
        states = [layer._streaming_state for layer in self.model.ttt_layers.values()]
        return [state.fast_weights()[0].clone() for state in states]

    def step(self, frames: Any) -> tuple[dict[int, Any], set[int]]:
        spoken, before = self.engine.step(frames), self.before
        self.before = self.weights()
        return spoken, {
            row
            for new, old in zip(self.before, before, strict=True)
            for row in range(len(new))
            if not torch.equal(new[row], old[row])
        }


@pytest.mark.parametrize("rule", [pytest.param("sum", marks=pytest.mark.slow), "delta"])
def test_callers_of_the_same_moment_never_write_together(rule: str) -> None:
    callers, chunk_size, num_frames = 8, 8, 20
    model, codec = parts(RULES[rule](chunk_size=chunk_size))
    voices = [speech(num_frames, seed) for seed in range(callers)]
    said: list[list[Any]] = [[] for _ in range(callers)]
    writes: Counter[int] = Counter()
    with engine_of(model, codec, callers) as engine:
        watched, now = Watched(engine, model), 1000
        rows = [engine.join(now_frame=now) for _ in range(callers)]
        waits = [row.begin_frame - now for row in rows]
        # The first is never held back, and none longer than there are others.
        assert waits == list(range(callers))
        while any(len(answers) < num_frames for answers in said):
            on = [row for row in rows if row.begin_frame <= now and row.num_frames < num_frames]
            frames = {row.index: voices[row.index][row.num_frames] for row in on}
            spoken, wrote = watched.step(frames)
            for row in on:
                said[row.index].append(spoken[row.index])
            assert len(wrote) <= 1
            writes.update(wrote)
            now += 1
        together = watched.weights()
    assert writes == dict.fromkeys(range(callers), 2)
    # In a batch of the same size matrix products are rounded alike: what the others do, and when
    # a row begins, changes not a bit.
    for index in (0, 3, 7):
        with engine_of(model, codec, callers) as engine:
            alone = [engine.step({index: frame})[index] for frame in voices[index]]
            weights = Watched(engine, model).before
        assert [s.text_token for s in alone] == [s.text_token for s in said[index]]
        for a, b in zip(alone, said[index], strict=True):
            assert np.array_equal(a.audio, b.audio)
        for found, expected in zip(together, weights, strict=True):
            assert torch.equal(found[index], expected[index]) and expected[index].any()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_who_comes_later_avoids_what_the_others_clocks_have_become(seed: int) -> None:
    """Pauses, new beginnings and forgetting shift a row's clock: what counts is where it stands."""
    rng, chunk_size = np.random.default_rng(seed), 6
    model, codec = parts(tiny_delta_args(chunk_size=chunk_size))
    voice = speech(1, seed)[0]
    with engine_of(model, codec, 5) as engine:
        watched = Watched(engine, model)
        others = [engine.join(now_frame=0) for _ in range(4)]
        for now in range(17):
            watched.step({row.index: voice for row in others if rng.random() < 0.6})
            if now == 9:
                engine.restart(others[1])
                engine.forget(others[2])
        now = 17
        row = engine.join(now_frame=now)
        assert now <= row.begin_frame <= now + 4
        endings: list[set[int]] = []
        for frame in range(now, now + 3 * chunk_size):
            rows = [*others, *([row] if frame >= row.begin_frame else [])]
            endings.append(watched.step({each.index: voice for each in rows})[1])
        mine = [wrote for wrote in endings if row.index in wrote]
        assert len(mine) >= 2 and all(wrote == {row.index} for wrote in mine)


def test_more_callers_than_frames_in_a_chunk_share_them_evenly() -> None:
    model, codec = parts(tiny_delta_args(chunk_size=4))
    with engine_of(model, codec, 10) as engine:
        waits = [engine.join(now_frame=7).begin_frame - 7 for _ in range(10)]
    assert waits == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_nobody_waits_where_it_helps_nobody() -> None:
    model, codec = parts(tiny_delta_args())
    with engine_of(model, codec, 3) as engine:
        # Alone, also after another has gone; without TTT; beside one who has none.
        first = engine.join(now_frame=3)
        engine.leave(first)
        alone = engine.join(now_frame=4)
        engine.leave(alone)
        without = engine.join(ttt_on=False, now_frame=5)
        beside = engine.join(now_frame=5)
        without_too = engine.join(ttt_on=False, now_frame=5)
        begins = [row.begin_frame for row in (without, beside, without_too)]
    assert max(begins) <= 5 and beside.begin_frame == 5
    for args in (tiny_linear_args(), TTTArgs()):
        # TTT-Linear writes in all rows alike; a model without TTT writes nothing.
        model, codec = parts(args)
        with engine_of(model, codec, 3) as engine:
            assert [engine.join(now_frame=9).begin_frame for _ in range(3)] == [9, 9, 9]


def test_the_server_welcomes_callers_of_one_moment_a_frame_apart() -> None:
    model, codec = parts(tiny_delta_args(chunk_size=16))
    voice = speech(6, 1)
    expected = np.concatenate(
        [s.audio for s in alone(model, codec, (voice * 32767).round() / 32768)]
    )

    async def call(server: Any, welcomed: list[int], all_are: asyncio.Event) -> np.ndarray:
        async with calling(server, "?format=pcm") as ws:
            await next_bytes(ws, 0)
            frame = time.monotonic() / FRAME_SEC
            key = json.loads(await next_bytes(ws, 4))["call"]
            welcomed.append(server.board.calls[key].row.begin_frame)
            # Not before its time, and soon after it.
            assert 0 <= frame - welcomed[-1] < 10
            if len(welcomed) == 4:
                all_are.set()
            await all_are.wait()
            return await say_pcm(ws, voice)

    async def scenario() -> None:
        async with serving(model, codec, 4) as server:
            now, all_are = time.monotonic() / FRAME_SEC, asyncio.Event()
            welcomed: list[int] = []
            said = await asyncio.gather(*[call(server, welcomed, all_are) for _ in range(4)])
        assert len(set(welcomed)) == 4 and welcomed == sorted(welcomed)
        assert welcomed[0] < now + 10 and welcomed[3] < welcomed[0] + 10
        for heard in said:
            np.testing.assert_allclose(heard, expected, atol=1e-4)

    asyncio.run(scenario())


def test_who_leaves_before_the_welcome_keeps_no_place() -> None:
    model, codec = parts(tiny_delta_args(chunk_size=16))

    async def scenario() -> None:
        async with serving(model, codec, 1) as server:
            engine = server.board.engine
            join = engine.join

            def join_in_an_hour(**how: Any) -> Any:
                if (row := join(**how)) is not None:
                    row.begin_frame += 45_000
                return row

            engine.join = join_in_an_hour  # type: ignore[method-assign]
            async with calling(server, "?format=pcm") as ws:
                await ws.send_bytes(b"\x01" + bytes(100))
            for _ in range(3000):
                if not server.board.calls:
                    break
                await asyncio.sleep(0.01)
            assert not server.board.calls and engine.join() is not None

    asyncio.run(scenario())
