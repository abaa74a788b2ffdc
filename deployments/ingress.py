"""Makes uvicorn, which runs behind Serve's ingress in each gateway replica, ignore trailers.

uvicorn appends the trailers of a chunked body to the request's headers, where they win over them. An
application can't distinguish them, so they are dropped where they are parsed.
"""

from __future__ import annotations

from uvicorn.protocols.http import auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class TrailerlessProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol; trailers go to a list that is never read."""

    def on_headers_complete(self) -> None:
        """The headers are complete: the application gets a list that trailers are not appended to."""
        super().on_headers_complete()
        self.scope["headers"] = list(self.headers)


def ignore_trailers() -> None:
    """Let the servers that uvicorn starts in this process from now on ignore trailers."""
    auto.AutoHTTPProtocol = TrailerlessProtocol
