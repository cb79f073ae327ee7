"""The server, by the protocol of stock `moshi.client`: several callers, and those who misbehave."""
# ruff: noqa: SIM117 (a server, and who calls it: two withs read better)

import asyncio
import gc
import json
import os
import re
import sys
import time
import types
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import sphn
from test_engine import FRAME_SAMPLES, alone, parts, speech

from finetune.data.codec import Codec
from finetune.serve.access import Gate, bind
from finetune.serve.calls import Switchboard
from finetune.serve.engine import open_engine
from finetune.serve.server import Server, running
from finetune.serve.session import Identity, identify
from ttt import TTTLMModel

ME = Identity("run/checkpoint_000007", "0123456789abcdef")


class Addressed(Server):
    """A server that knows where it is reached."""

    url: str


@asynccontextmanager
async def serving(
    model: TTTLMModel,
    codec: Codec,
    max_users: int,
    *,
    token: str | None = None,
    identity: Identity = ME,
    **how: Any,
) -> AsyncIterator[Addressed]:
    with open_engine(
        model, codec, max_users=max_users, temperature=0, text_temperature=0
    ) as engine:
        server = Addressed(Switchboard(engine, **how), identity, Gate("127.0.0.1", token))
        listening = bind("127.0.0.1", 0)
        async with running(server, listening):
            server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            yield server


@asynccontextmanager
async def calling(
    server: Addressed, query: str = ""
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    url = f"{server.url}/api/chat{query}"
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as ws:
        yield ws


def hang_up(ws: aiohttp.ClientWebSocketResponse) -> None:
    """Ends a call without goodbye."""
    connection = ws._response.connection
    assert connection is not None and connection.transport is not None
    connection.transport.abort()


async def next_bytes(ws: aiohttp.ClientWebSocketResponse, kind: int) -> bytes:
    while True:
        message = await asyncio.wait_for(ws.receive(), 60)
        assert message.type == aiohttp.WSMsgType.BINARY, message
        if message.data[0] == kind:
            return message.data[1:]


class Caller:
    """What stock `moshi.client` sends and does with what comes."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.writer, self.reader = sphn.OpusStreamWriter(24000), sphn.OpusStreamReader(24000)
        self.audio: list[np.ndarray] = []
        self.text = ""

    async def talk(self, frames: np.ndarray, until: int | None = None) -> tuple[np.ndarray, str]:
        """Send all, and hear the answer to the first `until`."""
        sending = asyncio.ensure_future(self.send(frames))
        wanted = (len(frames) if until is None else until) * FRAME_SAMPLES
        while sum(map(len, self.audio)) < wanted:
            message = await asyncio.wait_for(self.ws.receive(), 60)
            assert message.type == aiohttp.WSMsgType.BINARY, message
            if message.data[0] == 1:
                self.audio.append(self.reader.append_bytes(message.data[1:]))
            elif message.data[0] == 2:
                self.text += message.data[1:].decode()
            else:
                assert message.data == b"\x00"
        await sending
        return np.concatenate(self.audio)[:wanted], self.text

    async def send(self, frames: np.ndarray) -> None:
        for frame in frames:
            if encoded := self.writer.append_pcm(frame):
                await self.ws.send_bytes(b"\x01" + encoded)
                await asyncio.sleep(0.01)


async def solo(server_of: Callable[..., Any], frames: np.ndarray) -> tuple[np.ndarray, str]:
    # As many rows, for equality to the bit: Opus makes much of little.
    async with server_of(3) as server, calling(server) as ws:
        return await Caller(ws).talk(frames)


async def say_pcm(ws: aiohttp.ClientWebSocketResponse, frames: np.ndarray) -> np.ndarray:
    """The same as our page does: the samples of the answers."""
    for frame in frames:
        await ws.send_bytes(b"\x01" + (frame * 32767).round().astype("<i2").tobytes())
    heard = [np.frombuffer(await next_bytes(ws, 1), "<i2") for _ in frames]
    return np.concatenate(heard) / 32767


def test_three_callers_and_all_that_can_go_wrong() -> None:
    """One is well-behaved throughout; beside it one resets, one vanishes, one floods, one sends
    garbage, and one comes too many."""
    model, codec = parts("delta")
    voice, other = speech(22, 1), speech(22, 2)

    def server_of(max_users: int) -> Any:
        return serving(model, codec, max_users)

    async def scenario() -> None:
        expected = await solo(server_of, voice)
        said = alone(model, codec, (other * 32767).round() / 32768)
        expected_other = np.concatenate([spoken.audio for spoken in said])
        async with server_of(3) as server:
            async with calling(server) as good, calling(server, "?format=pcm") as resetting:
                good_call = asyncio.ensure_future(Caller(good).talk(voice))
                reset_call = asyncio.ensure_future(say_pcm(resetting, voice[:8]))
                async with calling(server) as flood, calling(server) as too_many:
                    refused = await asyncio.wait_for(too_many.receive(), 20)
                    assert refused.type == aiohttp.WSMsgType.CLOSE and refused.data == 1013
                    assert refused.extra == "every place is taken (3 in all); try again later"
                    # More than a row may wait for, at once, and then gone without goodbye.
                    flooding = Caller(flood)
                    flooded = asyncio.ensure_future(flooding.send(np.repeat(voice, 8, axis=0)))
                    await asyncio.sleep(1)
                    (call,) = [c for c in server.board.calls.values() if c.number == 3]
                    assert len(call.inbox) <= 25
                    flooded.cancel()
                    hang_up(flood)
                await reset_call
                await resetting.send_bytes(b"\x03\x03")
                again_call = asyncio.ensure_future(say_pcm(resetting, other))
                while len(server.board.calls) == 3:
                    await asyncio.sleep(0.02)
                async with calling(server) as garbage:
                    await next_bytes(garbage, 0)
                    for junk in (b"\x01garbage", b"\x09what", b"", b"\x04{", b"\x04[]", b"\x03"):
                        await garbage.send_bytes(junk)
                    await garbage.send_str("text")
                    for _ in range(60):
                        await garbage.send_bytes(b"\x01" + os.urandom(50))
                    while (cut := await asyncio.wait_for(garbage.receive(), 20)).data != 1008:
                        assert cut.data[0] in (1, 5)
                    assert cut.data == 1008 and "no meaning" in (cut.extra or "")
                found, again = await good_call, await again_call
            assert np.array_equal(found[0], expected[0])
            assert found[1] == expected[1] != ""
            np.testing.assert_allclose(again, expected_other, atol=1e-4)
            page = server.board.metrics.page().decode()
            assert 'refused_total{reason="full"} 1.0' in page

    asyncio.run(scenario())


def test_answers_are_those_of_the_engine() -> None:
    model, codec = parts("sum")
    voice = speech(10, 3)
    expected = alone(model, codec, (voice * 32767).round() / 32768)

    async def scenario() -> None:
        async with serving(model, codec, 2) as server, calling(server, "?format=pcm") as ws:
            await next_bytes(ws, 0)
            about = json.loads(await next_bytes(ws, 4))
            assert about["layers"] == [0, 2] and about["frame_samples"] == FRAME_SAMPLES
            pcm = (voice * 32767).round().astype("<i2").tobytes()
            for start in range(0, len(pcm), 1000):
                await ws.send_bytes(b"\x01" + pcm[start : start + 1000])
            for index, spoken in enumerate(expected):
                heard = np.frombuffer(await next_bytes(ws, 1), "<i2") / 32767
                np.testing.assert_allclose(heard, spoken.audio.clip(-1, 1), atol=1e-4)
                note = json.loads(await next_bytes(ws, 4))
                assert note["at_sec"] == round(index * 0.08, 2) and note["waited_ms"] > 0
            assert note["changes"]["0"] > 0

    asyncio.run(scenario())


def test_stock_client_works_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moshi.client` itself, with a microphone and a loudspeaker that are made of arrays."""
    model, codec = parts("sum")
    voice = speech(12, 4)
    played, tokens, logged = [], [], []

    class Stream:
        def __init__(self, callback: Any, **how: Any) -> None:
            self.callback = callback

        def __exit__(self, *exc: Any) -> Any:
            return None

    class Microphone(Stream):
        def __enter__(self) -> None:
            for frame in voice:
                self.callback(frame[:, None], FRAME_SAMPLES, None, None)

    class Loudspeaker(Stream):
        def __enter__(self) -> Any:
            return None

    fake = types.ModuleType("sounddevice")
    monkeypatch.setattr(fake, "InputStream", Microphone, raising=False)
    monkeypatch.setattr(fake, "OutputStream", Loudspeaker, raising=False)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    from moshi import client

    class Printer(client.RawPrinter):
        def print_token(self, token: str) -> None:
            tokens.append(token)

        def log(self, level: str, msg: str) -> None:
            logged.append((level, msg))

    async def scenario() -> None:
        async with serving(model, codec, 1) as server:
            connections = []
            original = client.Connection.__init__

            def remember(self: Any, *args: Any, **kwargs: Any) -> None:
                original(self, *args, **kwargs)
                connections.append(self)

            monkeypatch.setattr(client.Connection, "__init__", remember)
            monkeypatch.setattr(client.Connection, "_lost_connection", lambda self: None)
            args = types.SimpleNamespace(url=server.url)
            running_client = asyncio.ensure_future(client.run(Printer(), args))
            while not connections or connections[0]._output_queue.qsize() < len(voice):
                await asyncio.sleep(0.02)
                assert not running_client.done(), running_client.result()
            while not connections[0]._output_queue.empty():
                played.append(connections[0]._output_queue.get())
            running_client.cancel()
            await asyncio.gather(running_client, return_exceptions=True)

    asyncio.run(scenario())
    # It warns of the handshake, a kind that it does not know, and of nothing else.
    assert [msg for level, msg in logged if level != "info"] == ["unknown message kind 0"], logged
    assert len(played) == len(voice) and np.abs(np.concatenate(played)).max() > 1e-3
    assert "".join(tokens).strip()


def test_a_caller_who_is_late_is_paused_or_hears_silence() -> None:
    model, codec = parts("sum")
    voice = speech(6, 5)

    async def scenario(on_late: Any, num_frames: int) -> tuple[int, int, float]:
        async with serving(model, codec, 1, on_late=on_late) as server:
            async with calling(server, "?format=pcm") as ws:
                await next_bytes(ws, 4)
                pcm = (voice * 32767).astype("<i2")
                await ws.send_bytes(b"\x01" + pcm[:3].tobytes())
                await asyncio.sleep(0.8)
                await ws.send_bytes(b"\x01" + pcm[3:].tobytes())
                (call,) = server.board.calls.values()
                give_up_at = time.monotonic() + 30
                while call.row.num_frames < num_frames or not call.num_late:
                    assert time.monotonic() < give_up_at
                    await asyncio.sleep(0.05)
                page = server.board.metrics.page().decode()
                (dropped,) = re.findall(r"dropped_frames_total ([\d.]+)", page)
                for _ in range(num_frames):
                    said_to.append(json.loads(await next_bytes(ws, 4)).get("frame"))
                return call.row.num_frames, call.num_late, float(dropped)

    said_to: list[Any] = []
    heard, late, dropped = asyncio.run(scenario("pause", 6))
    assert heard == 6 and late > 0 and dropped == 0
    assert said_to == [0, 1, 2, 3, 4, 5]
    said_to.clear()
    heard, late, dropped = asyncio.run(scenario("silence", 13))
    # Each answer says which frame it goes with: none while silence was heard in its place.
    assert said_to[:4] == [0, 1, 2, None]
    # Silence goes on at the pace of speech; frames that would only come later still are not heard.
    assert heard >= 13 and late > 0 and dropped <= 3


def test_memory_and_sessions_of_a_call() -> None:
    model, codec = parts("delta")
    voice = speech(16, 6)
    pcm = [b"\x01" + (frame * 32767).round().astype("<i2").tobytes() for frame in voice]

    async def said(ws: aiohttp.ClientWebSocketResponse, messages: Any) -> list[Any]:
        for message in messages:
            await ws.send_bytes(message)
        heard = [await next_bytes(ws, 1) for _ in messages]
        return heard

    async def scenario() -> None:
        mine = identify(model, codec, Path("mine"))
        async with serving(model, codec, 2, identity=mine) as server:
            async with calling(server, "?format=pcm") as ws, aiohttp.ClientSession() as http:
                key = json.loads(await next_bytes(ws, 4))["call"]
                session = f"{server.url}/api/calls/{key}/session"
                await said(ws, pcm[:9])
                saved = await (await http.get(session)).read()
                rest = await said(ws, pcm[9:])
                # The same again, from where it was.
                answer = await http.put(session, data=saved)
                assert (answer.status, await answer.text()) == (200, "all\n")
                assert await said(ws, pcm[9:]) == rest
                answer = await http.get(f"{session}?part=memory")
                assert "moshi-memory.session" in answer.headers["Content-Disposition"]
                assert len(await answer.read()) < len(saved)
                (call,) = server.board.calls.values()
                await ws.send_bytes(b'\x04{"do": "forget"}')
                await said(ws, pcm[:1])
                assert server.board.engine.changes()[0][call.row.index] == 0
                await ws.send_bytes(b'\x04{"do": "ttt", "on": false}')
                await said(ws, pcm[:7])
                assert server.board.engine.changes()[0][call.row.index] == 0
                assert not call.row.ttt_on

                # One at a time: the second is told to come again.
                statuses = []
                for answer in await asyncio.gather(*[http.get(session) for _ in range(2)]):
                    statuses.append(answer.status)
                assert sorted(statuses) == [200, 429]

                for data, status, word in (
                    (b"junk", 409, "no session"),
                    (b"x" * (len(saved) + 2**21), 413, ""),
                ):
                    answer = await http.put(session, data=data)
                    assert answer.status == status and word in await answer.text()
                answer = await http.get(f"{server.url}/api/calls/unknown/session")
                assert answer.status == 404
                answer = await http.get(f"{session}?part=../../etc/passwd")
                assert answer.status == 400
        other = Identity("other/checkpoint_000001", "feedfeedfeed")
        async with serving(model, codec, 1, identity=other) as server:
            async with calling(server, "?format=pcm") as ws, aiohttp.ClientSession() as http:
                key = json.loads(await next_bytes(ws, 4))["call"]
                answer = await http.put(f"{server.url}/api/calls/{key}/session", data=saved)
                text = await answer.text()
                assert answer.status == 409 and "'mine'" in text and "other/checkpoint" in text

    asyncio.run(scenario())


@pytest.mark.slow
def test_200_connects_leave_nothing_behind() -> None:
    model, codec = parts("delta")
    voice = speech(3, 8)

    def held() -> tuple[int, int, int]:
        gc.collect()
        return len(gc.get_objects()), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())

    async def scenario() -> None:
        async with serving(model, codec, 3) as server:
            for index in range(200):
                async with calling(server) as ws:
                    await Caller(ws).talk(voice, until=2)
                    if index % 2:
                        hang_up(ws)
                while server.board.calls:
                    await asyncio.sleep(0.005)
                if index == 20:
                    await asyncio.sleep(0.3)
                    before = held()
            await asyncio.sleep(0.3)
            after = held()
        assert after[0] < before[0] + 500, (before, after)
        assert after[1] <= before[1] + 2 and after[2] <= before[2] + 1, (before, after)

    asyncio.run(scenario())
