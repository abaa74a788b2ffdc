"""GET of one page of text, bounded in time and size: for health probes and for metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import aiohttp

from controlplane.http.redirects import MAX_REDIRECTS, redirect_target

_CHUNK_BYTES: Final = 65536
MAX_PAGE_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Page:
    """What a GET returned. If there was no complete response, ``status`` is 0 and ``error`` is the reason."""

    status: int
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the status is 200."""
        return self.status == 200

    def __str__(self) -> str:
        return self.error or f"returned status {self.status}"


async def fetch(
    url: str,
    *,
    timeout_s: float,
    secret: str = "",
    max_bytes: int = MAX_PAGE_BYTES,
    session: aiohttp.ClientSession | None = None,
) -> Page:
    """GET ``url``, with ``secret`` as bearer token if it is not empty. Errors are returned, not raised.

    Without a ``session``, the connection is a new one and is closed afterwards. Redirects are followed within
    the same host only (:func:`redirect_target`), because they would send the secret elsewhere.
    """
    if session is None:
        async with aiohttp.ClientSession() as own_session:
            return await fetch(
                url, timeout_s=timeout_s, secret=secret, max_bytes=max_bytes, session=own_session
            )
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(url, headers=headers, allow_redirects=False) as response:
                    target = None
                    if 300 <= response.status < 400:
                        target = redirect_target(url, response.headers.get("location", ""))
                    if target is None:
                        return await _page(response, max_bytes)
                    url = target
        return Page(0, error=f"sent more than {MAX_REDIRECTS} redirects")
    except TimeoutError:
        return Page(0, error=f"no response within {timeout_s:g} s")
    except ConnectionRefusedError:
        return Page(0, error="connection refused")
    except aiohttp.ClientConnectorError as error:
        refused = isinstance(error.os_error, ConnectionRefusedError)
        return Page(0, error="connection refused" if refused else f"can't connect: {error.os_error}")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Page(0, error=f"{type(error).__name__}: {error}")


async def _page(response: aiohttp.ClientResponse, max_bytes: int) -> Page:
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            return Page(0, error=f"sent more than {max_bytes} bytes")
    return Page(response.status, body.decode("utf-8", "replace"))
