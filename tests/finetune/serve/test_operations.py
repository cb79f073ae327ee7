"""Who may call the server and how it ends: token, page, metrics, addresses, draining."""
# ruff: noqa: SIM117 (a server, and who calls it: two withs read better)

import asyncio
import io
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile
from test_engine import parts, speech
from test_server import ME, Addressed, Caller, calling, hang_up, next_bytes, say_pcm, serving
from yarl import URL

from finetune.errors import UserError
from finetune.serve import chat, open_engine
from finetune.serve import lines as lines_of_page
from finetune.serve.access import bind, check_access
from finetune.serve.calls import Waiting
from finetune.serve.options import ServeOptions
from finetune.serve.server import _serve


def test_the_token_the_page_and_what_operations_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 1, token="correct-horse") as server:
            async with aiohttp.ClientSession() as http:
                for path in ("/api/chat", "/metrics", "/metrics?token=wrong"):
                    assert (await http.get(server.url + path)).status == 401
                for path in ("/", "/page.js", "/plot.js", "/page.css", "/worklet.js", "/health"):
                    assert (await http.get(server.url + path)).status == 200, path
                bearer = {"Authorization": "Bearer correct-horse"}
                for path in ("/page/../server.py", "/..%2fserver.py", "/engine.py"):
                    url = URL(server.url + path, encoded=True)
                    assert (await http.get(url, headers=bearer)).status == 404, path
                page = await (await http.get(f"{server.url}/metrics", headers=bearer)).text()
                for name in (
                    "moshi_ttt_step_seconds_bucket",
                    "moshi_ttt_callers 0.0",
                    'moshi_ttt_refused_total{reason="token"} ',
                    "moshi_ttt_late_frames_total",
                    "moshi_ttt_dropped_frames_total",
                    "moshi_ttt_state_bytes",
                    "moshi_ttt_gpu_memory_bytes",
                ):
                    assert name in page, name
                assert (await http.get(f"{server.url}/api/lines")).status == 401
                lines = await (await http.get(f"{server.url}/api/lines", headers=bearer)).json()
                assert [line["kind"] for line in lines[::2]] == ["fact", "filler", "question"]
                assert lines[0]["text"] == "Laura likes oranges."
                for index, seconds in ((0, 1), (2, 5), (4, 1)):
                    place = f"{server.url}/api/lines/{index}"
                    sound = await (await http.get(place, headers=bearer)).read()
                    audio, rate_hz = soundfile.read(io.BytesIO(sound))
                    assert rate_hz == 24000 and len(audio) > seconds * rate_hz
                    assert np.abs(audio).max() > 0.1
                for path in ("6", "999", "x", "-1"):
                    place = f"{server.url}/api/lines/{path}"
                    assert (await http.get(place, headers=bearer)).status == 404, path
                monkeypatch.setattr(lines_of_page, "find_spec", lambda _: None)
                assert (
                    await (await http.get(f"{server.url}/api/lines", headers=bearer)).json() == []
                )
                foreign = {**bearer, "Origin": "https://elsewhere.example"}
                assert (await http.get(f"{server.url}/metrics", headers=foreign)).status == 403
                async with http.ws_connect(f"{server.url}/api/chat?token=correct-horse") as ws:
                    assert (await ws.receive()).data == b"\x00"
                    await ws.send_bytes(b"\x01" + bytes(2**16))
                    assert (await ws.receive()).data == 1009
                for _ in range(100):
                    health = await (await http.get(f"{server.url}/health")).json()
                    await asyncio.sleep(0.01)
                assert health == {"status": "ok"} and not server.board.calls

    asyncio.run(scenario())


def test_who_may_listen_where() -> None:
    check_access("127.0.0.1", None)
    check_access("::1", None)
    check_access("0.0.0.0", "long enough")
    with pytest.raises(UserError, match="--token"):
        check_access("0.0.0.0", None)
    with pytest.raises(UserError, match="8 characters"):
        check_access("127.0.0.1", "short")
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be listened on"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="no address"):
        bind("no such host", 1)
    for host in ("a..b", "x" * 70):
        with pytest.raises(UserError, match=r"--host: .* is no address"):
            bind(host, 1)


async def status_of(server: Addressed, *headers: bytes, path: bytes = b"/metrics") -> int:
    """The status of a request, byte by byte as strangers send them."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"\r\n".join([b"GET " + path + b" HTTP/1.1", *headers, b"", b""]))
    line = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    return int(line.split()[1])


def test_what_strangers_send_is_refused_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 1, token=" correct-horse\n") as server:
            host, right = b"Host: moshi.example", b"Authorization: Bearer correct-horse"
            assert await status_of(server, host, right) == 200
            assert await status_of(server, host, b"Authorization: Bearer \xff") == 401
            for origin in (b"http://[", b"null", b"http://other.example"):
                assert await status_of(server, host, right, b"Origin: " + origin) == 403
        async with serving(model, codec, 1) as server:
            # A name that somebody has given the address of this machine.
            for name in (b"evil.example", b"evil.example:8998", b"127.0.0.1.evil.example", b"["):
                origin = b"Origin: http://" + name
                assert await status_of(server, b"Host: " + name, origin) == 403, name
                for path, status in ((b"/", 403), (b"/page.js", 403), (b"/health", 200)):
                    assert await status_of(server, b"Host: " + name, path=path) == status, path
            for name in (b"localhost:8998", b"127.0.0.1", b"[::1]:8998"):
                for path in (b"/metrics", b"/", b"/page.js"):
                    assert await status_of(server, b"Host: " + name, path=path) == 200, name

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.exc_info] == []


def test_who_asks_for_what_there_is_not_is_told_so() -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 1) as server, calling(server, "?format=pcm") as ws:
            await next_bytes(ws, 4)
            requests = 'unknown request; there are {"do": "restart"}, {"do": "forget"} and {"do": '
            for message, said in (
                (b'\x04{"do": "fly"}', requests),
                (b'\x04{"do": "ttt", "on": "maybe"}', requests),
                (b"\x04[1]", requests),
                (b"\x04{do: forget}", "no JSON (Expecting property name"),
                (b"\x04\xff", "no JSON ("),
                (b"\x09what", "unknown kind of message"),
                (b"\x01abc", "half a sample"),
            ):
                await ws.send_bytes(message)
                assert (await next_bytes(ws, 5)).decode().startswith(said), message
            # The call goes on.
            await say_pcm(ws, speech(2, 7))

    asyncio.run(scenario())


def test_an_unknown_format_is_named() -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 1) as server:
            async with calling(server, "?format=foo") as ws:
                closed = await asyncio.wait_for(ws.receive(), 10)
                assert closed.data == 1008 and closed.extra == "format: opus or pcm, got 'foo'"
            for query in ("?format=opus", "?format=pcm", "?other=foo"):
                async with calling(server, query) as ws:
                    await next_bytes(ws, 0)
                    await ws.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("is_drained", "why"), [(True, "the server is shutting down"), (False, "left")]
)
def test_the_log_says_who_ended_a_call(
    caplog: pytest.LogCaptureFixture, is_drained: bool, why: str
) -> None:
    model, codec = parts("sum")
    caplog.set_level(logging.INFO, "finetune.serve")

    async def scenario() -> None:
        async with serving(model, codec, 1) as server, calling(server, "?format=pcm") as ws:
            await next_bytes(ws, 4)
            if is_drained:
                draining = asyncio.ensure_future(server.drain(0, asyncio.Event()))
                while (await asyncio.wait_for(ws.receive(), 5)).type == aiohttp.WSMsgType.BINARY:
                    pass
                await draining
            else:
                await ws.close()
            while server.board.calls:
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
    events = [json.loads(record.getMessage()) for record in caplog.records]
    assert [event["why"] for event in events if event["event"] == "call_ended"] == [why]


def test_draining_lets_calls_end() -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 2) as server, calling(server) as ws:
            hurry = asyncio.Event()
            draining = asyncio.ensure_future(server.drain(600, hurry))
            await asyncio.sleep(0.1)
            async with calling(server) as late:
                assert (await late.receive()).data == 1012
            caller = Caller(ws)
            await caller.talk(speech(3, 7))
            assert not draining.done()
            hurry.set()
            closed = await asyncio.wait_for(ws.receive(), 5)
            while closed.type == aiohttp.WSMsgType.BINARY:
                closed = await asyncio.wait_for(ws.receive(), 5)
            assert closed.data == 1001 and closed.extra == "the server is shutting down"
            await draining

    asyncio.run(scenario())


def test_a_caller_who_does_not_read_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the row nor the end of the server waits for them."""
    model, codec = parts("sum")
    monkeypatch.setattr(chat, "GOODBYE_SEC", 0.3)

    async def scenario() -> None:
        async with serving(model, codec, 1) as server:
            async with calling(server, "?format=pcm") as ws:
                await ws.receive()
                connection = ws._response.connection
                assert connection is not None and connection.transport is not None
                connection.transport.pause_reading()
                (transport,) = server.sockets.values()
                assert transport is not None
                transport.write(bytes(2**25))  # more than the network holds
                await asyncio.wait_for(server.drain(0, asyncio.Event()), 5)
                for _ in range(100):
                    if not server.board.calls:
                        break
                    await asyncio.sleep(0.02)
                assert not server.board.calls and not server.sockets
                hang_up(ws)

    asyncio.run(scenario())


def test_if_the_model_fails_callers_hear_so_and_the_server_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, codec = parts("sum")
    caplog.set_level(logging.INFO, "finetune.serve")

    def fail(frames: Any) -> None:
        raise RuntimeError("CUDA error")

    async def scenario() -> None:
        with open_engine(model, codec, max_users=2) as engine, bind("127.0.0.1", 0) as listening:
            monkeypatch.setattr(engine, "step", fail)
            options = ServeOptions(checkpoint=tmp_path)
            ending = asyncio.ensure_future(_serve(engine, ME, options, listening))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with aiohttp.ClientSession() as http:
                async with http.ws_connect(f"{url}/api/chat?format=pcm") as ws:
                    await ws.receive()
                    await ws.receive()
                    await ws.send_bytes(b"\x01" + bytes(3840))
                    closed = await asyncio.wait_for(ws.receive(), 10)
                    assert closed.data == 1011 and "the model has failed" in str(closed.extra)
            with pytest.raises(UserError, match=r"the model failed at .*CUDA error"):
                await asyncio.wait_for(ending, 20)

    asyncio.run(scenario())
    events = [json.loads(record.message)["event"] for record in caplog.records]
    assert events.count("engine_failed") == 1
    assert [r for r in caplog.records if r.exc_info] == []


def test_a_server_whose_model_has_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codec = parts("sum")

    async def scenario() -> None:
        async with serving(model, codec, 1) as server:
            monkeypatch.setattr(server.board.engine, "step", lambda frames: 1 / 0)
            async with calling(server, "?format=pcm") as ws:
                await ws.send_bytes(b"\x01" + bytes(3840))
                while (await asyncio.wait_for(ws.receive(), 10)).data != 1011:
                    pass
            async with aiohttp.ClientSession() as http:
                health = await http.get(f"{server.url}/health")
                assert (health.status, await health.json()) == (503, {"status": "failed"})
            async with calling(server) as late:
                assert (await late.receive()).data == 1011

    asyncio.run(scenario())


def test_who_floods_restarts_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model, codec = parts("sum")
    voice = speech(12, 9)
    order: list[str] = []

    async def scenario() -> None:
        async with serving(model, codec, 2) as server:
            engine = server.board.engine
            for name in ("restart", "_advance"):
                method = getattr(engine, name)

                def noted(*args: Any, name: str = name, method: Any = method) -> Any:
                    order.append(name)
                    return method(*args)

                monkeypatch.setattr(engine, name, noted)
            async with calling(server, "?format=pcm") as good, calling(server) as flooding:
                await next_bytes(good, 4)
                await next_bytes(flooding, 0)
                call, flood = server.board.calls.values()
                order.clear()
                flood.inbox.extend([Waiting("restart", 0.0)] * 20)
                call.inbox.extend([Waiting(frame, 0.0) for frame in voice])
                server.board.wake()
                for _ in voice:
                    await next_bytes(good, 1)
                steps = [index for index, name in enumerate(order) if name == "_advance"]
                # No steps for restarts alone, and a restart at most from one step to the next.
                assert len(steps) <= len(voice) + 1, order
                assert order[: steps[0]].count("restart") <= 1, order
                assert max(np.diff(steps)) <= 2, order

    asyncio.run(scenario())
