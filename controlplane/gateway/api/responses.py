"""``POST /v1/responses`` for tiers whose engines serve only ``/v1/chat/completions``.

The request is translated and goes through routing, admission and the relay as a chat completion;
the response is translated back, event by event.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from controlplane.core.routing.endpoint_table import EndpointTable
from controlplane.core.routing.tier_table import resolve
from controlplane.errors import BadRequest, EngineFailed
from controlplane.gateway.api.responses_request import chat_request
from controlplane.gateway.api.responses_writer import Event, ResponsesWriter
from controlplane.gateway.request_body import without_mark
from controlplane.gateway.request_context import route_request
from controlplane.http.json_reader import InvalidJson, reader
from controlplane.http.messages import Headers, Request, Responder, json_bytes, send_error
from controlplane.http.sse import EventBuffer

CHAT_PATH: Final = "/v1/chat/completions"
MAX_VALUES: Final = 200_000
"""The most values, counted by their commas, of a request that is translated: 16 MiB of small ones would take
seconds."""
_DONE: Final = b"[DONE]"
_decode = reader(dict[str, Any])


def needs_translation(table: EndpointTable, request: Request) -> bool:
    """Whether the request is for a tier whose endpoints don't serve ``/v1/responses`` themselves. Raises
    :class:`~controlplane.errors.BadRequest` if the members that routing reads are wrong."""
    if all(load.endpoint.capabilities.responses for load in table.by_endpoint_id.values()):
        return False
    for rank in resolve(route_request(request), table.tier_table).order:
        loads = table.pools[rank].loads
        if loads:
            return not any(load.endpoint.capabilities.responses for load in loads)
    return False


async def serve_translated(
    infer: Callable[[Request, Responder], Awaitable[None]], request: Request, out: Responder
) -> None:
    """Serve the request with a chat completion, which ``infer`` handles; errors become responses."""
    try:
        if request.body.count(b",") > MAX_VALUES:
            raise BadRequest(f"the request body has over {MAX_VALUES} values")
        fields = _decode(without_mark(request.body))
    except InvalidJson as error:
        raise BadRequest(f"the request body {error}", param=error.member) from None
    body = json_bytes(chat_request(fields))
    await infer(request.derived(CHAT_PATH, request.headers, body), TranslatingResponder(out, fields))


class TranslatingResponder:
    """Receives a chat completion and sends it to ``out`` as a response."""

    def __init__(self, out: Responder, fields: dict[str, Any]) -> None:
        self._out = out
        self._writer = ResponsesWriter(fields)
        self._events = EventBuffer()

    @property
    def started(self) -> bool:
        """Whether the status line was sent."""
        return self._out.started

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected."""
        return self._out.gone

    @property
    def congested(self) -> bool:
        """Whether the client reads too slowly."""
        return self._out.congested

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole completion as a response; an error as it is."""
        if status < 400:
            try:
                body = json_bytes(self._writer.whole(_decode(body)))
            except InvalidJson:
                send_error(self._out, EngineFailed("the engine's response can't be parsed"), headers)
                return
        self._out.send(status, headers, body)

    def start(self, status: int, headers: Headers) -> None:
        """Begin a stream."""
        self._out.start(status, headers)

    def write(self, data: bytes) -> None:
        """Send the events of a completion as those of a response."""
        for event in self._events.feed(data).replace(b"\r\n", b"\n").split(b"\n\n"):
            if event:
                self._translate(event)

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        await self._out.drain()

    def finish(self) -> None:
        """Mark the body as complete."""
        self._out.finish()

    def abort(self) -> None:
        """Abort the response."""
        self._out.abort()

    def _translate(self, event: bytes) -> None:
        data = b"\n".join(
            line.removeprefix(b"data:").strip() for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if not data:
            self._out.write(event + b"\n\n")  # a comment, which keeps the connection open
            return
        if self._writer.ended:
            return
        if data == _DONE:
            self._send(self._writer.end())
            return
        try:
            chunk = _decode(data)
        except InvalidJson:
            return
        error = chunk.get("error")
        self._send(self._writer.error(error) if isinstance(error, dict) else self._writer.chunk(chunk))

    def _send(self, events: list[Event]) -> None:
        self._out.write(
            b"".join(
                b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json_bytes(event)) for event in events
            )
        )
