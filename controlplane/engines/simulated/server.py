"""The simulated engine as a process: ``python -m controlplane.engines.simulated.server``.

Gateways are benchmarked against it, so it has to be faster than they are. Each event of a stream is one HTTP
chunk; all events that are due at the same time go out in one write.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hmac
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any, Final

import uvloop
from pydantic import ValidationError

from controlplane.engines.simulated.batching import BatchScheduler, Finish, Generation, metrics_text
from controlplane.engines.simulated.engine import FAULTS, KEY_ENV, SimulatedSettings
from controlplane.engines.simulated.requests import InvalidRequest, embeddings, parse, token_count
from controlplane.engines.simulated.wire_formats import WireFormat
from controlplane.http.messages import JSON_TYPE, Headers, Request
from controlplane.http.server import HttpResponder, HttpServer

_ENGINE_HEADER: Final = (b"x-engine", b"simulated")
_JSON_HEADERS: Final[Headers] = [(b"content-type", JSON_TYPE), _ENGINE_HEADER]
_TEXT_HEADERS: Final[Headers] = [(b"content-type", b"text/plain; version=0.0.4"), _ENGINE_HEADER]
_STREAM_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    _ENGINE_HEADER,
]
_SETTINGS_PATH: Final = "/simulated/knobs"
_MAX_BODY_BYTES: Final = 64 * 1024 * 1024


class SimulatedServer:
    """The engine's routes, its scheduler and its settings, which a request can change at run time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: SimulatedSettings, model: str) -> None:
        self.loop = loop
        self.model = model
        self.created_unix_s = int(time.time())
        self.scheduler = BatchScheduler(loop, settings)
        self.http = HttpServer(self._handle, max_body_bytes=_MAX_BODY_BYTES, share_port=False)
        secret = os.environ.pop(KEY_ENV, "")
        self._bearer = f"Bearer {secret}".encode() if secret else b""
        self._api_key = secret.encode()
        self._address = ("127.0.0.1", 0)
        self._next_id = 0
        self._not_hanging = asyncio.Event()
        if not settings.hang:
            self._not_hanging.set()
        self._revert: asyncio.TimerHandle | None = None
        self._reopening: asyncio.Task[None] | None = None

    @property
    def settings(self) -> SimulatedSettings:
        """The current settings."""
        return self.scheduler.settings

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._address[1]

    async def listen(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError if the address is not available."""
        self._address = (host, await self.http.start(host, port))

    def apply(self, settings: SimulatedSettings, requested_by: HttpResponder | None = None) -> None:
        """Applies settings; ``refuse`` resets all connections except that of the request that sets it."""
        before = self.settings
        if settings.exit_code is not None:
            self.loop.call_later(0.02, os._exit, settings.exit_code)
        if settings.exit_after_s is not None:
            self.loop.call_later(settings.exit_after_s, os._exit, 1)
        self.scheduler.change(settings)
        if settings.refuse and not before.refuse:
            self.http.stop_listening()
            self.http.abort_connections(spare=requested_by)
        elif before.refuse and not settings.refuse:
            self._reopening = self.loop.create_task(self.listen(*self._address))
        if settings.hang:
            self._not_hanging.clear()
        else:
            self._not_hanging.set()

    def _change(self, values: dict[str, Any], for_s: float | None, requested_by: HttpResponder) -> None:
        """Change some settings, for ``for_s`` seconds or for good; ValidationError changes nothing."""
        before = self.settings
        after = SimulatedSettings.model_validate({**before.model_dump(), **values})
        if self._revert is not None:
            self._revert.cancel()
            self._revert = None
        self.apply(after, requested_by)
        if for_s is not None:
            self._revert = self.loop.call_later(for_s, self.apply, before)

    def _handle(self, request: Request, responder: HttpResponder) -> Awaitable[None] | None:
        if self.settings.hang and request.path != _SETTINGS_PATH:
            return self._handle_later(request, responder)
        return self._handle_now(request, responder)

    async def _handle_later(self, request: Request, responder: HttpResponder) -> None:
        await self._not_hanging.wait()
        rest = self._handle_now(request, responder)
        if rest is not None:
            await rest

    def _handle_now(self, request: Request, responder: HttpResponder) -> Awaitable[None] | None:
        path = request.path
        if path == "/health":
            responder.send(503 if self.settings.health_fails else 200, _JSON_HEADERS, b"{}")
        elif not self._authorized(request):
            responder.send(401, _JSON_HEADERS, b'{"error":"Unauthorized"}')
        elif request.method == "POST" and path.startswith("/v1/"):
            return self._generate(request, responder)
        elif path == "/v1/models":
            responder.send(200, _JSON_HEADERS, self._models())
        elif path == "/metrics":
            responder.send(200, _TEXT_HEADERS, metrics_text(self.scheduler, self.model))
        elif path == _SETTINGS_PATH:
            self._settings(request, responder)
        else:
            _send_error(responder, 404, f"no route {path}")
        return None

    def _authorized(self, request: Request) -> bool:
        """Whether the request carries the secret, as a bearer token or in Anthropic's x-api-key."""
        if not self._bearer:
            return True
        headers = request.headers
        return hmac.compare_digest(headers.get(b"authorization", b""), self._bearer) or hmac.compare_digest(
            headers.get(b"x-api-key", b""), self._api_key
        )

    def _generate(self, request: Request, responder: HttpResponder) -> Awaitable[None] | None:
        if self.scheduler.fails_next():
            _send_error(responder, self.settings.error_status, "this error is simulated (error_rate)")
            return None
        try:
            if request.path == "/v1/embeddings":
                responder.send(200, _JSON_HEADERS, embeddings(request.body, self.model, self.settings))
                return None
            if request.path == "/v1/messages/count_tokens":
                responder.send(200, _JSON_HEADERS, token_count(request.body, self.model))
                return None
            self._next_id += 1
            parsed = parse(request.path, request.body, self.model, f"sim{self._next_id:x}", self.settings)
        except InvalidRequest as invalid:
            _send_error(responder, invalid.status, invalid.message)
            return None
        response = (StreamedResponse if parsed.stream else WholeResponse)(responder, parsed.wire_format)
        generation = self.scheduler.submit(parsed.generation, response)
        return None if responder.finished else response.until_ended(self.scheduler, generation)

    def _models(self) -> bytes:
        card = {
            "id": self.model,
            "object": "model",
            "created": self.created_unix_s,
            "owned_by": "simulated",
            "root": self.model,
            "parent": None,
            "max_model_len": self.settings.max_model_len,
        }
        return json.dumps({"object": "list", "data": [card]}).encode()

    def _settings(self, request: Request, responder: HttpResponder) -> None:
        if request.method == "POST":
            try:
                values = json.loads(request.body or b"{}")
                for_s = values.pop("for_s", None)
                self._change(values, None if for_s is None else float(for_s), responder)
            except (ValueError, AttributeError, TypeError, ValidationError) as error:
                _send_error(responder, 400, str(error))
                return
        faults = self.settings.model_dump(include=set(FAULTS), exclude_defaults=True)
        body = {"settings": self.settings.model_dump(), "faults": faults}
        responder.send(200, _JSON_HEADERS, json.dumps(body).encode())


def _send_error(responder: HttpResponder, status: int, message: str) -> None:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    responder.send(status, _JSON_HEADERS, json.dumps(body).encode())


class GenerationResponse(ABC):
    """The HTTP response of one generation, and the sink of its tokens."""

    def __init__(self, responder: HttpResponder, wire_format: WireFormat) -> None:
        self._responder = responder
        self._wire_format = wire_format
        self._changed: asyncio.Event | None = None

    async def until_ended(self, scheduler: BatchScheduler, generation: Generation) -> None:
        """Waits until the response has ended; if cancelled, frees the generation's slot."""
        responder = self._responder
        self._changed = changed = asyncio.Event()
        try:
            while not responder.finished:
                if responder.congested:
                    scheduler.pause(generation)
                    await responder.drain()
                    scheduler.resume(generation)
                else:
                    await changed.wait()
                    changed.clear()
        finally:
            scheduler.abort(generation)

    def truncate(self) -> None:
        """Breaks the response off before its end."""
        self._responder.truncate()
        self._wake()

    def _wake(self) -> None:
        """Lets :meth:`until_ended` see that the response has ended or that the client reads too slowly."""
        if self._changed is not None:
            self._changed.set()

    @abstractmethod
    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Take the next tokens; with ``finish``, the last ones."""


class StreamedResponse(GenerationResponse):
    """Server-sent events, each one HTTP chunk."""

    def __init__(self, responder: HttpResponder, wire_format: WireFormat) -> None:
        super().__init__(responder, wire_format)
        self._count = 0

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Send the tokens, after the opening events and before the closing ones."""
        responder = self._responder
        events = self._wire_format.tokens(ids, texts, finish)
        self._count += len(ids)
        if not responder.started:
            responder.start(200, _STREAM_HEADERS)
            events = self._wire_format.opening() + events
        if finish is not None:
            events += self._wire_format.closing(self._count, finish)
        responder.write_chunks(events, finish=finish is not None)
        if finish is not None or responder.congested:
            self._wake()


class WholeResponse(GenerationResponse):
    """One JSON body, sent with the last token."""

    def __init__(self, responder: HttpResponder, wire_format: WireFormat) -> None:
        super().__init__(responder, wire_format)
        self._ids: list[int] = []
        self._texts: list[bytes] = []

    def emit(self, ids: list[int], texts: list[bytes], finish: Finish | None) -> None:
        """Collect the tokens; with the last, respond."""
        self._ids += ids
        self._texts += texts
        if finish is not None:
            self._responder.send(200, _JSON_HEADERS, self._wire_format.whole(self._ids, self._texts, finish))
            self._wake()


async def serve(host: str, port: int, model: str, settings: SimulatedSettings) -> None:
    """Loads, listens, and serves until SIGTERM or SIGINT."""
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
        print(f"RuntimeError: this exit is simulated (exit_code {settings.exit_code})", flush=True)
        raise SystemExit(settings.exit_code)
    await server.listen(host, port)
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    print(f"simulated: listening on {host}:{server.port}", flush=True)
    print("simulated: ready", flush=True)
    if settings.exit_after_s is not None:
        loop.call_later(settings.exit_after_s, os._exit, 1)
    await stopping.wait()
    await server.http.drain(0.0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="An OpenAI-compatible engine with a token timing model and no language model"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--model", default="simulated", help="the model id that it serves")
    parser.add_argument("--settings", default="{}", help="JSON of the timing model's settings")
    options = parser.parse_args()
    try:
        settings = SimulatedSettings.model_validate_json(options.settings)
    except ValidationError as error:
        parser.error(f"--settings: {error}")
    uvloop.run(serve(options.host, options.port, options.model, settings))


if __name__ == "__main__":
    main()
