"""The simulated engine's HTTP server: ``python -m controlplane.engines.simulated.server``.

A protocol on httptools and uvloop instead of a framework: it is what gateways are measured against, so
it has to be the faster side. Each token of a stream is one HTTP chunk; what falls due at once is written
at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hmac
import json
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import httptools
import uvloop
from pydantic import ValidationError

from controlplane.engines.simulated.batching import BatchScheduler, Finish, Generation, metrics_text
from controlplane.engines.simulated.engine import FAULTS, SECRET_ENV, SimulatedSettings
from controlplane.engines.simulated.requests import InvalidRequest, ParsedRequest, embeddings, parse
from controlplane.engines.simulated.wire_formats import WireFormat

_JSON = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nx-engine: simulated\r\ncontent-length: %d\r\n"
_TEXT = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\nx-engine: simulated\r\n"
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"x-engine: simulated\r\ntransfer-encoding: chunked\r\n"
)
_BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_LENGTHS = [b"%x\r\n" % size for size in range(4096)]
_REASONS = {200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 404: b"Not Found", 503: b"Unavailable"}
_MAX_BODY_BYTES = 64 * 1024 * 1024


class SimulatedRequest(NamedTuple):
    """A request as it came over the wire."""

    method: bytes
    path: bytes
    authorization: bytes
    api_key: bytes
    body: bytes
    keep_alive: bool


class SimulatedServer:
    """The engine as a whole: its clockwork, its settings, its listening socket, its connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: SimulatedSettings, model: str) -> None:
        self.loop = loop
        self.model = model
        self.created = int(time.time())
        self.clockwork = BatchScheduler(loop, settings)
        secret = os.environ.pop(SECRET_ENV, "")
        self._bearer = f"Bearer {secret}".encode() if secret else b""
        self._api_key = secret.encode()
        self.connections: set[SimulatedConnection] = set()
        self._listener: asyncio.Server | None = None
        self._address = ("127.0.0.1", 0)
        self._next_id = 0
        self._revert: asyncio.TimerHandle | None = None
        self._changing: asyncio.Task[None] | None = None

    @property
    def settings(self) -> SimulatedSettings:
        """The settings now in force."""
        return self.clockwork.settings

    def allowed(self, authorization: bytes, api_key: bytes) -> bool:
        """Whether the request carries the secret, as a bearer token or as Anthropic's x-api-key."""
        if not self._bearer:
            return True
        return hmac.compare_digest(authorization, self._bearer) or hmac.compare_digest(api_key, self._api_key)

    def ident(self) -> str:
        """A new answer's id."""
        self._next_id += 1
        return f"sim{self._next_id:x}"

    async def listen(self, host: str, port: int) -> None:
        """Bind and accept."""
        self._address = (host, port)
        listening = socket.create_server((host, port), backlog=2048, reuse_port=False)
        self._address = (host, listening.getsockname()[1])
        self._listener = await self.loop.create_server(lambda: SimulatedConnection(self), sock=listening)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._address[1]

    def change(self, values: dict[str, Any], for_s: float | None, asking: SimulatedConnection) -> None:
        """New settings, for a while if ``for_s`` is given; ValidationError changes nothing."""
        before = self.settings
        after = SimulatedSettings.model_validate({**before.model_dump(), **values})
        if self._revert is not None:
            self._revert.cancel()
            self._revert = None
        self._apply(after, asking)
        if for_s is not None:
            self._revert = self.loop.call_later(for_s, self._apply, before, None)

    def _apply(self, after: SimulatedSettings, asking: SimulatedConnection | None) -> None:
        before = self.settings
        if after.exit_code is not None:
            self.loop.call_later(0.02, os._exit, after.exit_code)
        if after.exit_after_s is not None:
            self.loop.call_later(after.exit_after_s, os._exit, 1)
        self.clockwork.change(after)
        if after.refuse and not before.refuse:
            if self._listener is not None:
                self._listener.close()
            for connection in list(self.connections):
                if connection is not asking:
                    connection.reset()
        elif before.refuse and not after.refuse:
            self._changing = self.loop.create_task(self.listen(*self._address))
        if before.hang and not after.hang:
            for connection in list(self.connections):
                connection.proceed()

    def models(self) -> bytes:
        """The body of ``/v1/models``."""
        card = {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "simulated",
            "root": self.model,
            "parent": None,
            "max_model_len": self.settings.max_model_len,
        }
        return json.dumps({"object": "list", "data": [card]}).encode()


class SimulatedConnection(asyncio.Protocol):
    """One client's connection; answers its requests one after the other."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[SimulatedRequest] = deque()
        self._busy = False
        self._answer: GenerationResponse | None = None
        self._new_request()

    def _new_request(self) -> None:
        self._url = b""
        self._authorization = b""
        self._api_key = b""
        self._body: list[bytes] = []
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: what it asked for is aborted."""
        self._server.connections.discard(self)
        self._transport = None
        if self._answer is not None:
            self._answer.abandon()
            self._answer = None

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.write(
                    b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
                self._transport.close()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        if self._answer is not None:
            self._answer.pause()

    def resume_writing(self) -> None:
        """The client has read."""
        if self._answer is not None:
            self._answer.resume()

    def on_url(self, url: bytes) -> None:
        """httptools: a part of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: a header."""
        lower = name.lower()
        if lower == b"authorization":
            self._authorization = value
        elif lower == b"x-api-key":
            self._api_key = value
        elif lower == b"expect" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """httptools: a part of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > _MAX_BODY_BYTES:
            self.reset()
            return
        self._body.append(body)

    def on_message_complete(self) -> None:
        """httptools: the request is all there."""
        request = SimulatedRequest(
            self._parser.get_method(),
            self._url.partition(b"?")[0],
            self._authorization,
            self._api_key,
            b"".join(self._body),
            self._parser.should_keep_alive(),
        )
        self._new_request()
        if self._busy or (self._server.settings.hang and request.path != b"/simulated/knobs"):
            self._waiting.append(request)
        else:
            self._handle(request)

    def proceed(self) -> None:
        """Answer what waited."""
        while self._waiting and not self._busy and self._transport is not None:
            self._handle(self._waiting.popleft())

    def reset(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def cut(self) -> None:
        """Close the connection, once what was written is sent."""
        self._answer = None
        if self._transport is not None:
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Send bytes, if the client is still there."""
        if self._transport is not None:
            self._transport.write(data)

    def done(self, keep_alive: bool) -> None:
        """The answer under way has ended."""
        self._busy = False
        self._answer = None
        if not keep_alive and self._transport is not None:
            self._transport.close()
        elif self._waiting:
            self._server.loop.call_soon(self.proceed)

    def _handle(self, request: SimulatedRequest) -> None:
        method, path, authorization, api_key, body, keep_alive = request
        server = self._server
        if path == b"/health":
            self._json(503 if server.settings.health_fails else 200, b"{}", keep_alive)
        elif not server.allowed(authorization, api_key):
            self._json(401, b'{"error":"Unauthorized"}', keep_alive)
        elif method == b"POST" and path.startswith(b"/v1/"):
            self._generate(path, body, keep_alive)
        elif path == b"/v1/models":
            self._json(200, server.models(), keep_alive)
        elif path == b"/metrics":
            text = metrics_text(server.clockwork, server.model)
            self._send(_TEXT + b"content-length: %d\r\n" % len(text), text, keep_alive)
        elif path == b"/simulated/knobs":
            self._knobs(method, body, keep_alive)
        else:
            self._error(404, f"no route {path.decode('latin-1')}", keep_alive)

    def _generate(self, path: bytes, body: bytes, keep_alive: bool) -> None:
        server = self._server
        if server.clockwork.errs():
            self._error(server.settings.error_status, "the simulated engine was told to fail", keep_alive)
            return
        try:
            if path == b"/v1/embeddings":
                self._json(200, embeddings(body, server.model, server.settings), keep_alive)
                return
            asked = parse(path, body, server.model, server.ident(), server.settings)
        except InvalidRequest as refused:
            self._error(refused.status, refused.message, keep_alive)
            return
        self._busy = True
        answer = (StreamedResponse if asked.stream else WholeResponse)(self, server, asked, keep_alive)
        self._answer = answer
        answer.begin()

    def _knobs(self, method: bytes, body: bytes, keep_alive: bool) -> None:
        server = self._server
        if method == b"POST":
            try:
                values = json.loads(body or b"{}")
                for_s = values.pop("for_s", None)
                server.change(values, None if for_s is None else float(for_s), self)
            except (ValueError, AttributeError, TypeError, ValidationError) as error:
                self._error(400, str(error), keep_alive)
                return
        faults = server.settings.model_dump(include=set(FAULTS), exclude_defaults=True)
        settings = server.settings.model_dump()
        self._json(200, json.dumps({"settings": settings, "faults": faults}).encode(), keep_alive)

    def _error(self, status: int, message: str, keep_alive: bool) -> None:
        kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
        body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        self._json(status, json.dumps(body).encode(), keep_alive)

    def _json(self, status: int, body: bytes, keep_alive: bool) -> None:
        self._send(_JSON % (status, _REASONS.get(status, b"Error"), len(body)), body, keep_alive)

    def _send(self, head: bytes, body: bytes, keep_alive: bool) -> None:
        if self._transport is None:
            return
        if keep_alive:
            self._transport.write(head + b"\r\n" + body)
        else:
            self._transport.write(head + b"connection: close\r\n\r\n" + body)
            self._transport.close()

    def answer_json(self, body: bytes, keep_alive: bool) -> None:
        """A generated answer in one piece."""
        self._json(200, body, keep_alive)


class GenerationResponse(ABC):
    """The HTTP side of one generation."""

    def __init__(
        self, connection: SimulatedConnection, server: SimulatedServer, asked: ParsedRequest, keep_alive: bool
    ) -> None:
        self._connection = connection
        self._server = server
        self._asked = asked
        self._keep_alive = keep_alive
        self._generation: Generation | None = None
        self._ended = False
        self._paused = False

    @property
    def _shape(self) -> WireFormat:
        return self._asked.shape

    def begin(self) -> None:
        """Hand the request to the clockwork."""
        generation = self._server.clockwork.submit(self._asked.ask, self)
        if not self._ended:
            self._generation = generation
            if self._paused:
                self._server.clockwork.block(generation)

    def abandon(self) -> None:
        """The client is gone."""
        self._ended = True
        if self._generation is not None:
            self._server.clockwork.abort(self._generation)

    def pause(self) -> None:
        """Generate no more until the client has read."""
        self._paused = True
        if self._generation is not None:
            self._server.clockwork.block(self._generation)

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        if self._generation is not None:
            self._server.clockwork.unblock(self._generation)

    def cut(self) -> None:
        """The clockwork: end it without an ending."""
        self._ended = True
        self._connection.cut()

    @abstractmethod
    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """The clockwork: tokens."""


class StreamedResponse(GenerationResponse):
    """As server-sent events, one HTTP chunk each."""

    def __init__(
        self, connection: SimulatedConnection, server: SimulatedServer, asked: ParsedRequest, keep_alive: bool
    ) -> None:
        super().__init__(connection, server, asked, keep_alive)
        self._opened = False
        self._count = 0

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Write what came, with the head before the first and the ending after the last."""
        parts: list[bytes] = []
        events = self._shape.tokens(ids, texts, finish)
        self._count += len(ids)
        if not self._opened:
            self._opened = True
            parts.append(_SSE_HEAD if self._keep_alive else _SSE_HEAD + b"connection: close\r\n")
            parts.append(b"\r\n")
            events = self._shape.opening() + events
        if finish is not None:
            events += self._shape.closing(self._count, finish)
        for event in events:
            size = len(event)
            parts += (_LENGTHS[size] if size < 4096 else b"%x\r\n" % size, event, b"\r\n")
        if finish is not None:
            parts.append(b"0\r\n\r\n")
            self._ended = True
        self._connection.write(b"".join(parts))
        if finish is not None:
            self._connection.done(self._keep_alive)


class WholeResponse(GenerationResponse):
    """In one piece, once all tokens are there."""

    def __init__(
        self, connection: SimulatedConnection, server: SimulatedServer, asked: ParsedRequest, keep_alive: bool
    ) -> None:
        super().__init__(connection, server, asked, keep_alive)
        self._ids: list[int] = []
        self._texts: list[bytes] = []

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Collect; with the last, answer."""
        self._ids += ids
        self._texts += texts
        if finish is None:
            return
        self._ended = True
        body = self._shape.whole(self._ids, self._texts, finish)
        self._connection.answer_json(body, self._keep_alive)
        self._connection.done(self._keep_alive)


async def serve(host: str, port: int, model: str, settings: SimulatedSettings) -> None:
    """Load, listen, serve until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = SimulatedServer(loop, settings.model_copy(update={"exit_code": None}), model)
    print("simulated: loading weights", flush=True)
    if settings.load_s:
        try:
            await asyncio.wait_for(stopping.wait(), settings.load_s)
            return
        except TimeoutError:
            pass
    if settings.exit_code is not None:
        print(f"RuntimeError: the simulated engine was told to exit with {settings.exit_code}", flush=True)
        raise SystemExit(settings.exit_code)
    await server.listen(host, port)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    print(f"simulated: listening on {host}:{server.port}", flush=True)
    print("simulated: ready", flush=True)
    if settings.exit_after_s is not None:
        loop.call_later(settings.exit_after_s, os._exit, 1)
    await stopping.wait()
    for connection in list(server.connections):
        connection.reset()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="An OpenAI-compatible engine with a token timing model and no language model"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--model", default="simulated", help="the model id it answers to")
    parser.add_argument("--settings", default="{}", help="JSON of the timing model's settings")
    options = parser.parse_args()
    try:
        settings = SimulatedSettings.model_validate_json(options.settings)
    except ValidationError as error:
        parser.error(f"--settings: {error}")
    uvloop.run(serve(options.host, options.port, options.model, settings))


if __name__ == "__main__":
    main()
