"""One HTTP GET for readiness, health and metrics, on a connection of its own, bounded in time and size."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

_MAX_BODY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ProbeResponse:
    """The response to a probe. Without one, ``status`` is 0 and ``error`` is the reason."""

    status: int
    body: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the status is 200."""
        return self.status == 200

    def __str__(self) -> str:
        return self.error or f"returned status {self.status}"


async def get(url: str, secret: str, timeout_s: float) -> ProbeResponse:
    """GET ``url`` with ``secret`` as bearer token (none if empty). A network error is returned, not
    raised."""
    try:
        return await asyncio.wait_for(_get(url, secret), timeout_s)
    except TimeoutError:
        return ProbeResponse(0, error=f"no response within {timeout_s:g} s")
    except ConnectionRefusedError:
        return ProbeResponse(0, error="connection refused")
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return ProbeResponse(0, error=f"{type(error).__name__}: {error}")


async def _get(url: str, secret: str) -> ProbeResponse:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host = parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(
        host, port, ssl=ssl.create_default_context() if secure else None
    )
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        authorization = f"Authorization: Bearer {secret}\r\n" if secret else ""
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: */*\r\n{authorization}"
            "Connection: close\r\n\r\n".encode("latin-1")
        )
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split(" ", 2)[1])
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:])
        }
        return ProbeResponse(status, body=(await _body(reader, headers)).decode("utf-8", "replace"))
    except IndexError as error:
        raise ValueError("not an HTTP response") from error
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(min(int(headers["content-length"]), _MAX_BODY_BYTES))
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.read(_MAX_BODY_BYTES)
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        if len(body) + size > _MAX_BODY_BYTES:
            raise ValueError("the response is too large")
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(body)


def metric(text: str, name: str) -> float | None:
    """The sum of a metric's samples over all labels, in Prometheus' text format; None without samples."""
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ")
    ]
    return sum(values) if values else None
