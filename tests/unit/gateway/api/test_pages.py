"""Pages that one gateway replica fetches from another."""

from __future__ import annotations

from controlplane.gateway.api.pages import fetch_text
from controlplane.http.messages import Request, Responder
from tests.support.http_server import serving

BIG = b"x" * (8 * 1024 * 1024)


async def handler(_: Request, out: Responder) -> None:
    out.send(200, [], BIG)


async def test_a_large_exposition_is_fetched_whole() -> None:
    async with serving(handler) as (_, port):
        text = await fetch_text(f"http://127.0.0.1:{port}/big")
        assert text == "" or len(text) == len(BIG)
        assert len(text) == len(BIG)
