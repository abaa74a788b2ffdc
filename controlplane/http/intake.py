"""What the gateway's own port and Serve's ingress both do with a request before its handler runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, TypedDict, TypeVar

from controlplane.errors import BadRequest, RequestError, UnsupportedEncoding
from controlplane.http.access import AccessRules
from controlplane.http.content_coding import CODINGS, coding_of, decode
from controlplane.http.limits import LARGE_BODY_BYTES, ReceivingBudget
from controlplane.http.messages import Headers, Request, Responder, payload_too_large, send_error

_ACCEPT_ENCODING: Final = (b"accept-encoding", ", ".join(CODINGS).encode())
_OF_THE_CODING: Final = frozenset({b"content-encoding", b"content-length"})
_DECODED_AT_ONCE: Final = 2
"""Large bodies that are decoded at one time."""
_LONGEST_LENGTH: Final = 19
"""Digits of the longest Content-Length that is read as a number."""

AnyResponder = TypeVar("AnyResponder", bound=Responder)


class IntakeSettings(TypedDict):
    """The arguments of an :class:`Intake` besides its handler, for two servers that share them."""

    max_body_bytes: int
    body_limit_setting: str
    access: AccessRules
    receiving: ReceivingBudget
    on_refused: Callable[[RequestError], None]


class Intake(Generic[AnyResponder]):
    """Checks requests, decodes their bodies and calls ``handler``.

    ``handler`` returns None if it has sent the response, otherwise an awaitable that sends the rest. A body
    over ``max_body_bytes`` is refused with 413; ``body_limit_setting`` names that limit's setting, if it has
    one. ``on_refused`` is called with the error of each request that is refused before its handler runs.
    """

    def __init__(
        self,
        handler: Callable[[Request, AnyResponder], Awaitable[None] | None],
        *,
        max_body_bytes: int,
        body_limit_setting: str = "",
        access: AccessRules | None = None,
        receiving: ReceivingBudget | None = None,
        on_refused: Callable[[RequestError], None] | None = None,
    ) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.receiving = receiving
        self._body_limit_setting = body_limit_setting
        self._access = access
        self._on_refused = on_refused
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    def refusal(self, method: str, headers: Mapping[bytes, bytes], hosts: int) -> RequestError | None:
        """Why a request with these headers is refused before its body is read, or None. ``hosts`` is the
        number of ``Host`` headers; 1 if a request of HTTP/1.0 has none."""
        if hosts != 1:
            return BadRequest("a request has one Host header, not " + (str(hosts) if hosts else "none"))
        access = self._access
        if access is None or (
            headers.get(b"host", b"") in access.good_hosts
            and b"origin" not in headers
            and b"sec-fetch-site" not in headers
        ):
            error = None  # what :meth:`AccessRules.refusal` says of nearly every request
        else:
            error = access.refusal(method, headers)
        if error is None and b"content-length" in headers:
            length = headers[b"content-length"]
            if len(length) > _LONGEST_LENGTH or (length.isdigit() and int(length) > self.max_body_bytes):
                return self.too_large()
        return error

    def response_headers(self, headers: Mapping[bytes, bytes]) -> Headers:
        """The headers to add to every response to a request with these headers."""
        if self._access is None or b"origin" not in headers:
            return []
        return self._access.response_headers(headers)

    def too_large(self) -> RequestError:
        """The error for a body over the limit."""
        return payload_too_large(self.max_body_bytes, self._body_limit_setting)

    def refused(self, error: RequestError) -> None:
        """Counts a refusal."""
        if self._on_refused is not None:
            self._on_refused(error)

    def handle(self, request: Request, out: AnyResponder) -> Awaitable[None] | None:
        """Handles a request that is complete; returns the same as ``handler``."""
        if self._access is not None and request.method == "OPTIONS":
            allowed = self._access.preflight(request.method, request.headers)
            if allowed is not None:
                out.send(200, allowed, b"")
                return None
        if b"content-encoding" in request.headers:
            return self._decoded(request, out)
        if len(request.body) > LARGE_BODY_BYTES and self.receiving is not None:
            return self._counted(request, out, self.receiving)
        return self.handler(request, out)

    async def _counted(self, request: Request, out: AnyResponder, budget: ReceivingBudget) -> None:
        """Handles a request with a large body, which counts meanwhile."""
        size_bytes = len(request.body)
        try:
            budget.hold_handled(size_bytes)
        except RequestError as error:
            self.refused(error)
            send_error(out, error, None, request.path)
            return
        try:
            rest = self.handler(request, out)
            if rest is not None:
                await rest
        finally:
            budget.release_handled(size_bytes)

    async def _decoded(self, request: Request, out: AnyResponder) -> None:
        held_bytes = 0
        try:
            coding = coding_of(request.header(b"content-encoding"))
            if coding and request.body:
                body = await decode(
                    coding, request.body, self.max_body_bytes, self._body_limit_setting, self._decoding
                )
                if self.receiving is not None:
                    self.receiving.hold_decoded(len(body))
                    held_bytes = len(body)
                headers = {
                    name: value for name, value in request.headers.items() if name not in _OF_THE_CODING
                }
                request = Request(request.method, request.path, request.query, headers, body)
        except RequestError as error:
            self.refused(error)
            headers_of_415 = [_ACCEPT_ENCODING] if isinstance(error, UnsupportedEncoding) else None
            send_error(out, error, headers_of_415, request.path)
            return
        try:
            rest = self.handler(request, out)
            if rest is not None:
                await rest
        finally:
            if self.receiving is not None and held_bytes:
                self.receiving.release_decoded(held_bytes)
