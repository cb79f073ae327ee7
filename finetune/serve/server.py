"""The server answers calls, keeps their sessions, and gives out the page and metrics."""

import asyncio
import signal
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import get_args

import torch
from aiohttp import WSCloseCode, web

from finetune.errors import UserError
from finetune.inference import load_for_inference, nonfinite_weights
from finetune.monitoring import setup_logging
from finetune.serve import wire
from finetune.serve.access import Gate, token_of, url_of
from finetune.serve.calls import Call, Switchboard, log_event
from finetune.serve.chat import say_goodbye, talk
from finetune.serve.engine import Engine, open_engine
from finetune.serve.lines import LINES, can_speak, spoken
from finetune.serve.options import Part, ServeOptions
from finetune.serve.session import Identity, Session, copy_row, decode, encode, identify, place

HEARTBEAT_SEC = 20.0
UPLOAD_SEC = 600.0
"""Seconds that a session may take to come."""
_WARM_UP_STEPS = 4
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/plot.js": ("plot.js", "text/javascript"),
    "/worklet.js": ("worklet.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; "
    "media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_NOTHING_CALLED = "there is no such call"
_FAILED = "the model has failed; the server must be started again"


class Server:
    """The web application around a switchboard.

    Args:
        gate: what all but `/health` is behind; of the page it asks for no token.
    """

    def __init__(self, board: Switchboard, identity: Identity, gate: Gate) -> None:
        self.board, self.identity, self.gate = board, identity, gate
        self.draining = False
        self._transferring = asyncio.Semaphore(1)
        self._speaking = asyncio.Lock()
        self.sockets: dict[web.WebSocketResponse, asyncio.Transport | None] = {}
        self._goodbyes: dict[web.WebSocketResponse, str] = {}
        """Calls that the server has ended, and why."""
        # A session is at most all of a row, and its header.
        max_upload = board.engine.row_bytes() + 2**20
        self.app = web.Application(client_max_size=max_upload, middlewares=[self._guard])
        self.app.add_routes(
            [
                web.get("/api/chat", self.chat),
                web.get("/api/calls/{key}/session", self.save_session),
                web.put("/api/calls/{key}/session", self.load_session),
                web.get("/api/lines", self.lines),
                web.get("/api/lines/{index:[0-9]{1,3}}", self.line),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                *[web.get(path, self.page) for path in _PAGE],
            ]
        )
        self.app.on_shutdown.append(self.end_calls)  # type: ignore[arg-type]
        folder = files("finetune.serve") / "page"
        self._page = {path: (folder / name).read_bytes() for path, (name, _) in _PAGE.items()}

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Let nobody past the gate, but to `/health`, and with a token to the page, which asks for
        it."""
        if request.path == "/health":
            return await handler(request)
        is_page = request.path in _PAGE
        refusal = self.gate.name_refusal(request) if is_page else self.gate.refusal(request)
        if refusal is not None:
            reason, answer = refusal
            self.board.metrics.refused.labels(reason).inc()
            log_event("refused", reason=reason)
            raise answer
        return await handler(request)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A call. Stock clients name no format; queries that this server does not know are those
        of other Moshi servers, and mean nothing."""
        form = request.query.get("format", "opus")
        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_SEC, max_msg_size=wire.MAX_MESSAGE_BYTES, compress=False
        )
        transport = request.transport
        await ws.prepare(request)
        if form not in get_args(wire.Format):
            why = f"format: opus or pcm, got {form[:40]!r}"
            return await self._refuse(ws, transport, "format", WSCloseCode.POLICY_VIOLATION, why)
        if self.board.is_over:
            return await self._refuse(ws, transport, "failed", WSCloseCode.INTERNAL_ERROR, _FAILED)
        if self.draining:
            restart = WSCloseCode.SERVICE_RESTART
            return await self._refuse(ws, transport, "draining", restart, "shutting down")
        call = await self.board.join(wants_changes=form == "pcm")
        if call is None:
            places = len(self.board.engine.rows)
            why = f"every place is taken ({places} in all); try again later"
            return await self._refuse(ws, transport, "full", WSCloseCode.TRY_AGAIN_LATER, why)
        self.sockets[ws] = transport
        why = "vanished"
        try:
            why = await talk(ws, transport, call, self.board, form)  # type: ignore[arg-type]
        finally:
            self.sockets.pop(ws, None)
            # To the call it looks as if the caller had closed it.
            await self.board.hang_up(call, self._goodbyes.pop(ws, why))
        return ws

    async def _refuse(
        self,
        ws: web.WebSocketResponse,
        transport: asyncio.Transport | None,
        reason: str,
        code: int,
        why: str,
    ) -> web.WebSocketResponse:
        self.board.metrics.refused.labels(reason).inc()
        log_event("refused", reason=reason)
        await say_goodbye(ws, transport, code, why)
        return ws

    async def save_session(self, request: web.Request) -> web.Response:
        call, part = self._call(request), request.query.get("part", "all")
        if part not in get_args(Part):
            raise web.HTTPBadRequest(text="part: all or memory\n")

        def copied() -> Session:
            if not self.board.is_on(call):
                raise web.HTTPNotFound(text=f"{_NOTHING_CALLED}\n")
            return copy_row(self.board.engine, call.row, self.identity, part)  # type: ignore[arg-type]

        # All calls wait while the row is copied; the rest is not in their way.
        async with self._transfer():
            session = await self.board.use_engine(copied)
            content = await asyncio.to_thread(encode, session, self.identity)
        log_event("session_saved", call=call.number, part=part, bytes=len(content))
        # A memory must not take the place of all in a folder of downloads.
        name = "moshi-memory.session" if part == "memory" else "moshi.session"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(body=content, content_type="application/octet-stream", headers=headers)

    async def load_session(self, request: web.Request) -> web.Response:
        call = self._call(request)

        def placed(session: Session) -> None:
            if not self.board.is_on(call):
                raise web.HTTPNotFound(text=f"{_NOTHING_CALLED}\n")
            place(self.board.engine, call.row, session)

        async with self._transfer():
            try:
                content = await asyncio.wait_for(request.read(), UPLOAD_SEC)
            except asyncio.TimeoutError:
                raise web.HTTPRequestTimeout(text="the session came too slowly\n") from None
            engine, identity = self.board.engine, self.identity
            session = await asyncio.to_thread(decode, engine, identity, content, "this file")
            await self.board.use_engine(placed, session)
        part = session.part
        log_event("session_loaded", call=call.number, part=part, bytes=len(content))
        return web.Response(text=f"{part}\n")

    @asynccontextmanager
    async def _transfer(self) -> AsyncIterator[None]:
        """Let one session be saved or loaded at a time: each is as large as a row, on the host."""
        if self._transferring.locked():
            raise web.HTTPTooManyRequests(
                text="another session is being saved or loaded; try again\n",
                headers={"Retry-After": "2"},
            )
        async with self._transferring:
            try:
                yield
            except UserError as error:
                raise web.HTTPConflict(text=f"{error}\n") from None

    def _call(self, request: web.Request) -> Call:
        if self.board.is_over:
            raise web.HTTPServiceUnavailable(text=f"{_FAILED}\n")
        call = self.board.calls.get(request.match_info["key"])
        if call is None:
            raise web.HTTPNotFound(text=f"{_NOTHING_CALLED}\n")
        return call

    async def lines(self, request: web.Request) -> web.Response:
        """What the page can say for a caller; nothing without espeak-ng."""
        found = [asdict(line) for line in LINES] if can_speak() else []
        return web.json_response(found)

    async def line(self, request: web.Request) -> web.Response:
        index = int(request.match_info["index"])
        if index >= len(LINES):
            raise web.HTTPNotFound(text="there is no such line\n")
        try:
            # espeak-ng is one for the process: one line at a time.
            async with self._speaking:
                sound = await asyncio.to_thread(spoken, index)
        except UserError as error:
            raise web.HTTPServiceUnavailable(text=f"{error}\n") from None
        return web.Response(body=sound, content_type="audio/wav")

    async def health(self, request: web.Request) -> web.Response:
        status = "failed" if self.board.is_over else "draining" if self.draining else "ok"
        return web.json_response({"status": status}, status=200 if status == "ok" else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.board.metrics.page(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def page(self, request: web.Request) -> web.Response:
        kind = _PAGE[request.path][1]
        body = self._page[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=_HEADERS)

    async def drain(self, drain_sec: float, hurry: asyncio.Event) -> None:
        """Take no more calls, and wait for those that there are; then end them."""
        self.draining = True
        log_event("draining", callers=len(self.board.calls))
        loop = asyncio.get_running_loop()
        until = loop.time() + drain_sec
        while self.sockets and loop.time() < until and not hurry.is_set():
            await asyncio.sleep(0.05)
        await self.end_calls(self.app)

    async def end_calls(self, app: web.Application) -> None:
        """Say goodbye to all callers."""
        code, why = WSCloseCode.GOING_AWAY, "the server is shutting down"
        if self.board.is_over:
            code, why = WSCloseCode.INTERNAL_ERROR, _FAILED
        open_ones = {ws: socket for ws, socket in self.sockets.items() if not ws.closed}
        self._goodbyes |= dict.fromkeys(open_ones, why)
        await asyncio.gather(
            *[say_goodbye(ws, transport, code, why) for ws, transport in open_ones.items()],
            return_exceptions=True,
        )

    async def hear_calls(self) -> None:
        """Let the model hear all calls, for ever.

        Raises:
            UserError: the model has failed; all callers have been told.
        """
        try:
            await self.board.run()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            log_event("engine_failed", error=reason, file=place.filename, line=place.lineno)
            await self.end_calls(self.app)
            raise UserError(
                f"the model failed at {place.filename}:{place.lineno} ({reason}); all calls have "
                "ended. Start the server again."
            ) from error


@asynccontextmanager
async def running(server: Server, listening: socket.socket) -> AsyncIterator["asyncio.Task[None]"]:
    """Answer on a bound socket; the task lets the model hear, and ends if it fails."""
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=2.0)
    hearing = asyncio.ensure_future(server.hear_calls())
    try:
        await runner.setup()
        await web.SockSite(runner, listening).start()
        yield hearing
    finally:
        await runner.cleanup()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


def serve(options: ServeOptions, listening: socket.socket) -> None:
    """Answer calls until a signal asks to stop: see `finetune.cli.serve`.

    Args:
        listening: as `listen` gives it.

    Raises:
        UserError: an option or the checkpoint is wrong.
    """
    setup_logging()
    model, codec = load_for_inference(options.checkpoint, options.device, options.base_precision)
    if problem := nonfinite_weights(model):
        raise UserError(f"--checkpoint: {options.checkpoint}: {problem}: nobody could hear it.")
    identity = identify(model, codec, options.checkpoint)
    torch.manual_seed(options.seed)
    try:
        with open_engine(
            model,
            codec,
            max_users=options.max_users,
            temperature=options.temperature,
            text_temperature=options.text_temperature,
        ) as engine:
            warm_up(engine)
            asyncio.run(_serve(engine, identity, options, listening))
    except torch.OutOfMemoryError:
        raise UserError(
            f"--max_users: {options.max_users} calls at once need more memory than the GPU "
            "has; give fewer (docs/talk.md has what a call takes)."
        ) from None


async def _serve(
    engine: Engine, identity: Identity, options: ServeOptions, listening: socket.socket
) -> None:
    board = Switchboard(engine, on_late=options.on_late, ttt=options.ttt)
    server = Server(board, identity, Gate(options.host, token_of(options)))
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    async with running(server, listening) as hearing:
        host, port = listening.getsockname()[:2]
        log_event("listening", url=url_of(host, port), max_users=options.max_users)
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([stopping, hearing], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not hearing.done():
            await server.drain(options.drain_sec, hurry)
        if hearing.done():
            hearing.result()
    log_event("stopped")


def warm_up(engine: Engine) -> None:
    """Let slow first steps pass while nobody waits: on a GPU they are captured as graphs."""
    silence = torch.zeros(engine.frame_samples).numpy()
    for _ in range(_WARM_UP_STEPS):
        engine.step({row.index: silence for row in engine.rows})
    for row in engine.rows:
        engine.restart(row)
        engine.begin(row)
