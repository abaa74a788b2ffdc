"""Which host names and web pages may use a server that checks no key.

A browser lets any page send requests to any address, also to this machine's loopback. Two checks keep
other sites' pages out:

* **Host.** A page whose own name is made to point at the loopback address (DNS rebinding) sends that name. A
  server that listens on loopback therefore accepts only names that nobody can own in the public DNS.
* **Origin.** A page on another site may send simple requests without a preflight. Requests other than
  reads are refused if the browser says that they come from another site.

Clients other than browsers send neither ``Origin`` nor ``Sec-Fetch-Site``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Final

from controlplane.errors import BadRequest, Forbidden, RequestError
from controlplane.http.messages import Headers

_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._~%-]+)(?::(\d{0,5}))?")
_IPV4: Final = re.compile(r"\d{1,3}(\.\d{1,3}){3}")
_PRIVATE_SUFFIXES: Final = (".localhost", ".internal")
"""Names under these are never in the public DNS (RFC 6761; ICANN's resolution of July 2024)."""
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_SIMPLE_TYPES: Final = frozenset(
    {b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"}
)
"""Types of a body that a browser sends to another site without a preflight."""
_REQUESTED_HEADERS: Final = re.compile(rb"[A-Za-z0-9_, -]{0,4096}")
_PORTS: Final = {b"http": b"80", b"https": b"443"}
_PREFLIGHT_S: Final = b"600"
_KNOWN_HOSTS: Final = 256
"""Host headers whose check is remembered."""
EXPOSED: Final = b"retry-after, x-attempts, x-gpu-seconds, x-request-id, x-tier, x-tier-reason"


class AccessRules:
    """The checks of one gateway.

    With ``loopback_only``, names that someone could own in the public DNS are refused unless they are in
    ``allowed_hosts``; without it, ``allowed_hosts`` are the only names accepted, if there are any.
    ``cors_origins`` are the origins of pages that may use the gateway; ``*`` stands for all.
    """

    def __init__(
        self, *, loopback_only: bool, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = ()
    ) -> None:
        self._loopback_only = loopback_only
        self._allowed_hosts = frozenset(name.lower().rstrip(".") for name in allowed_hosts)
        self._origins = frozenset(origin.lower().encode() for origin in cors_origins)
        self._every_origin = b"*" in self._origins
        self.good_hosts: set[bytes] = set()
        """``Host`` headers that are known to be acceptable."""

    def refusal(self, method: str, headers: Mapping[bytes, bytes]) -> RequestError | None:
        """Why the request is refused, or None. A missing ``Host`` is not judged here."""
        host = headers.get(b"host", b"")
        if host not in self.good_hosts:
            error = self._host_refusal(host)
            if error is not None:
                return error
            if len(self.good_hosts) >= _KNOWN_HOSTS:
                self.good_hosts.clear()
            self.good_hosts.add(host)
        if b"origin" in headers or b"sec-fetch-site" in headers:
            return self._origin_refusal(method, headers, host)
        return None

    def response_headers(self, headers: Mapping[bytes, bytes]) -> Headers:
        """The CORS headers that let an allowed page read the response to its request."""
        origin = headers.get(b"origin", b"")
        if not origin or not self._allows(origin):
            return []
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"origin"),
        ]

    def preflight(self, method: str, headers: Mapping[bytes, bytes]) -> Headers | None:
        """The headers of the response to a browser's question whether a page may send a request (a CORS
        preflight); None if the request is not one. The page may not if they lack ``response_headers``."""
        if method != "OPTIONS" or not {b"origin", b"access-control-request-method"} <= headers.keys():
            return None
        allowed: Headers = [(b"access-control-allow-methods", b"GET, HEAD, POST")]
        requested = headers.get(b"access-control-request-headers", b"")
        if requested and _REQUESTED_HEADERS.fullmatch(requested):
            allowed.append((b"access-control-allow-headers", requested))
        allowed.append((b"access-control-max-age", _PREFLIGHT_S))
        return allowed

    def _allows(self, origin: bytes) -> bool:
        return self._every_origin or origin.lower() in self._origins

    def _host_refusal(self, host: bytes) -> RequestError | None:
        if not host:
            return None
        parts = _HOST.fullmatch(host)
        if parts is None:
            return BadRequest("the Host header is not a host name")
        name = parts[1].decode().lower().rstrip(".")
        if name in self._allowed_hosts or not (self._loopback_only or self._allowed_hosts):
            return None
        if self._loopback_only and _is_private(name):
            return None
        return Forbidden(
            f"requests for the host '{name[:100]}' are refused: add it to gateway.allowed_hosts",
            code="forbidden_host",
        )

    def _origin_refusal(
        self, method: str, headers: Mapping[bytes, bytes], host: bytes
    ) -> RequestError | None:
        origin = headers.get(b"origin", b"")
        if method in _READS and not (method == "OPTIONS" and b"access-control-request-method" in headers):
            return None
        site = headers.get(b"sec-fetch-site", b"")
        if site in {b"same-origin", b"none"} or (not site and (not origin or _same(origin, host))):
            return None
        if not origin or not self._allows(origin):
            shown = origin.decode("latin-1")[:100] or "another site"
            return Forbidden(f"pages of {shown} may not send this: add the origin to gateway.cors_origins")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method != "OPTIONS" and kind in _SIMPLE_TYPES:
            return Forbidden("a web page must send a body as content-type: application/json")
        return None


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address is reached from its own machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_private(name: str) -> bool:
    """Whether nobody can own this name in the public DNS: an address, a name without a dot, or one under a
    suffix that is reserved."""
    return (
        "." not in name
        or name.startswith("[")
        or _IPV4.fullmatch(name) is not None
        or name.endswith(_PRIVATE_SUFFIXES)
    )


def _same(origin: bytes, host: bytes) -> bool:
    """Whether a page of this origin was loaded from this host."""
    scheme, _, place = origin.lower().partition(b"://")
    port = b":" + _PORTS.get(scheme, b"")
    return place.removesuffix(port) == host.lower().removesuffix(port)
