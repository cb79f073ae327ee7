"""A websocket carries a call, both ways, until somebody ends it."""

import asyncio
import time
from contextlib import suppress

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from finetune.data import FRAME_RATE_HZ
from finetune.serve import wire
from finetune.serve.calls import Answer, Call, Switchboard, log_event

MAX_MALFORMED = 50
"""Messages of no meaning, after which a caller is cut off."""
MAX_MESSAGES_PER_SEC = 200.0
BURST_MESSAGES = 400.0
MAX_WAITING = 64
"""Messages of a caller that are read before there is time for them: a goodbye may come after them.
"""
MAX_SEND_SEC = 20.0
"""Seconds for which a caller may read nothing at all."""
GOODBYE_SEC = 3.0
"""Seconds that a caller has to answer the end of a call."""


class CutOff(Exception):
    """The server ends a call: the websocket's close code and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class Pace:
    """Lets messages by at `MAX_MESSAGES_PER_SEC`; who sends more is read later."""

    def __init__(self) -> None:
        self._allowed, self._at = BURST_MESSAGES, time.monotonic()

    async def wait(self) -> None:
        now = time.monotonic()
        earned = (now - self._at) * MAX_MESSAGES_PER_SEC
        self._allowed, self._at = min(BURST_MESSAGES, self._allowed + earned) - 1, now
        if self._allowed < 0:
            await asyncio.sleep(-self._allowed / MAX_MESSAGES_PER_SEC)


async def say_goodbye(
    ws: web.WebSocketResponse, transport: asyncio.Transport | None, code: int, why: str
) -> None:
    """Close a websocket; a caller who reads nothing for `GOODBYE_SEC` is disconnected."""
    try:
        # A caller who is gone meanwhile needs no goodbye.
        with suppress(ConnectionError, RuntimeError):
            closing = ws.close(code=code, message=why.encode()[:120])
            await asyncio.wait_for(closing, GOODBYE_SEC)
    except asyncio.TimeoutError:
        if transport is not None:
            transport.abort()


async def talk(
    ws: web.WebSocketResponse,
    transport: asyncio.Transport | None,
    call: Call,
    board: Switchboard,
    form: wire.Format,
) -> str:
    """Carry a call to its end, and return why it ended.

    Args:
        transport: the socket of `ws`.
    """
    sound = wire.sound(form, board.engine.codec.sample_rate_hz)
    tasks: list[asyncio.Future[None]] = []
    welcomed = asyncio.Event()
    messages: asyncio.Queue[WSMessage] = asyncio.Queue(MAX_WAITING)
    try:
        tasks = [
            asyncio.ensure_future(_receive(ws, messages)),
            asyncio.ensure_future(_listen(ws, messages, call, board, sound, welcomed)),
            asyncio.ensure_future(_answer(ws, call, board, sound, form, welcomed)),
            asyncio.ensure_future(_watch(call)),
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return "left"
    except CutOff as cut:
        await say_goodbye(ws, transport, cut.code, cut.why)
        return cut.why
    except (ConnectionError, RuntimeError):
        # The socket is gone, with or without a goodbye.
        return "vanished"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _welcome(call: Call, board: Switchboard) -> bytes:
    engine = board.engine
    return wire.metadata(
        call=call.key,
        rate_hz=engine.codec.sample_rate_hz,
        frame_samples=engine.frame_samples,
        layers=list(engine.model.ttt_layers),
        ttt_on=call.row.ttt_on,
    )


async def _watch(call: Call) -> None:
    await call.broken.wait()
    raise CutOff(WSCloseCode.INTERNAL_ERROR, "the model's state is no longer a number; call again")


async def _receive(ws: web.WebSocketResponse, messages: asyncio.Queue[WSMessage]) -> None:
    while True:
        received = await ws.receive()
        if received.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
            return
        if received.type == WSMsgType.ERROR:
            raise ConnectionError
        await messages.put(received)


async def _listen(
    ws: web.WebSocketResponse,
    messages: asyncio.Queue[WSMessage],
    call: Call,
    board: Switchboard,
    sound: wire.Sound,
    welcomed: asyncio.Event,
) -> None:
    # Callers speak once they are welcomed. What they say before is heard then.
    await welcomed.wait()
    pace = Pace()
    num_malformed = 0
    while True:
        received = await messages.get()
        await pace.wait()
        try:
            if received.type != WSMsgType.BINARY or not received.data:
                raise wire.Malformed("no binary message")
            await _hear(received.data[0], received.data[1:], call, board, sound)
        except wire.Malformed as problem:
            num_malformed += 1
            board.metrics.malformed.inc()
            if num_malformed == 1:
                log_event("malformed", call=call.number)
            if num_malformed > MAX_MALFORMED:
                why = f"too many messages of no meaning ({str(problem)[:60]})"
                raise CutOff(WSCloseCode.POLICY_VIOLATION, why) from None
            await _send(ws, wire.message(wire.ERROR, str(problem).encode()))


async def _hear(
    kind: int, payload: bytes, call: Call, board: Switchboard, sound: wire.Sound
) -> None:
    if kind == wire.AUDIO:
        for samples in sound.decode(payload):
            await call.hear(samples, board.engine.frame_samples, board.wake)
    elif (action := wire.action_of(kind, payload)) is not None:
        await call.put(action, board.wake)


async def _answer(
    ws: web.WebSocketResponse,
    call: Call,
    board: Switchboard,
    sound: wire.Sound,
    form: wire.Format,
    welcomed: asyncio.Event,
) -> None:
    await asyncio.sleep(call.begin_at - time.monotonic())
    await ws.send_bytes(wire.message(wire.HANDSHAKE))
    if form == "pcm":
        await ws.send_bytes(_welcome(call, board))
    welcomed.set()
    while True:
        answer = await call.outbox.get()
        board.wake()
        start_sec = call.words.num_frames / FRAME_RATE_HZ
        text = call.words.add(answer.spoken.text_token)
        call.words.done.clear()
        messages = []
        if audio := sound.encode(answer.spoken.audio):
            messages.append(wire.message(wire.AUDIO, audio))
        if form == "pcm":
            messages.append(_about(answer, start_sec, text))
        elif text:
            messages.append(wire.message(wire.TEXT, text.encode()))
        for message in messages:
            await _send(ws, message)


async def _send(ws: web.WebSocketResponse, message: bytes) -> None:
    try:
        await asyncio.wait_for(ws.send_bytes(message), MAX_SEND_SEC)
    except asyncio.TimeoutError:
        why = "nothing was read for too long"
        raise CutOff(WSCloseCode.TRY_AGAIN_LATER, why) from None


def _about(answer: Answer, start_sec: float, text: str) -> bytes:
    fields: dict[str, object] = {
        "at_sec": round(start_sec, 2),
        "waited_ms": round(answer.waited_sec * 1000, 1),
        "frame": answer.number,
    }
    if text:
        fields["text"] = text
    if answer.changes is not None:
        fields["changes"] = answer.changes
    return wire.metadata(**fields)
