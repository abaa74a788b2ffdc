"""Comments in a stream whose response has not begun, so that no load balancer closes the
silent connection: many do so after 60 s.

The price is that the status line is sent with the first comment. A request that fails afterwards ends with an
error event under status 200, and the headers do not name the tier. Failed attempts are still retried, unseen
by the client.
"""

from __future__ import annotations

import asyncio
from typing import Final

from controlplane.gateway.proxy.responses import STREAM_HEADERS, response_headers
from controlplane.gateway.request_context import RequestContext
from controlplane.http.messages import EVENT_STREAM, Responder

COMMENT: Final = b": waiting\n\n"


class WaitingComments:
    """Writes a comment every ``interval_s`` until :meth:`stop`."""

    def __init__(self, context: RequestContext, out: Responder, interval_s: float) -> None:
        self._context = context
        self._out = out
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(interval_s, self._write)

    def stop(self) -> None:
        """Write no more comments."""
        self._timer.cancel()

    def _write(self) -> None:
        out = self._out
        if out.gone:
            return
        if not out.started:
            headers = [(b"content-type", EVENT_STREAM), *STREAM_HEADERS]
            out.start(200, headers + response_headers(self._context)[:1])
        if not out.congested:
            out.write(COMMENT)
        self._timer = self._loop.call_later(self._interval_s, self._write)
