"""Routes of the gateway that no engine answers, and the list of all of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from controlplane.config import PlaneConfig, TierConfig
from controlplane.gateway.gateway import Gateway
from controlplane.gateway.request_context import APIS
from tests.support.gateway import plane, running

ORG_MODEL = "orga/Llama 3%"
COUNTED = {"model": "auto", "system": "be short", "messages": [{"role": "user", "content": "hello you"}]}


def org_plane() -> PlaneConfig:
    """A tier whose model id has characters that an address encodes."""
    tier = TierConfig(name="balanced", engine="simulated", served_model_name=ORG_MODEL)
    return PlaneConfig(tiers=[tier])


async def raw_get(rig: Any, path: str, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body; the address is sent as it stands, and redirects are not followed."""
    from yarl import URL

    url = URL(rig.base + path, encoded=True)
    async with rig.client.get(url, headers=headers, allow_redirects=False) as response:
        return response.status, response.headers, await response.read()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("auto", "auto"),
        ("balanced", "balanced"),
        ("orga/Llama%203%25", ORG_MODEL),
        ("orga%2FLlama%203%25", ORG_MODEL),
    ],
)
async def test_one_model_is_found_by_its_id(path: str, name: str) -> None:
    async with running(org_plane()) as rig:
        status, _, body = await raw_get(rig, f"/v1/models/{path}")
        assert status == 200
        entry = json.loads(body)
        assert (entry["id"], entry["object"]) == (name, "model")
        _, listed = await rig.get("/v1/models")
        assert entry in listed["data"]


@pytest.mark.parametrize("path", ["none", "orga", "", "%1b%5b2J", "a" * 5000])
async def test_a_model_that_is_not_there_is_openais_404(path: str) -> None:
    async with running(org_plane()) as rig:
        status, _, body = await raw_get(rig, f"/v1/models/{path}")
        error = json.loads(body)["error"]
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"].isprintable()
        assert len(error["message"]) < 500
        async with rig.client.post(rig.base + "/v1/models/auto") as response:
            assert response.status == 405


async def test_the_root_says_what_is_here_and_sends_browsers_to_the_page() -> None:
    async with running() as rig:
        status, _, body = await raw_get(rig, "/")
        assert status == 200
        for path in ("models", "health", "ui", "openapi"):
            assert json.loads(body)[path] in {route.path for route in rig.gateway.routes}
        status, head, _ = await raw_get(rig, "/", accept="text/html,application/xhtml+xml,*/*;q=0.8")
        assert (status, head["location"]) == (307, "ui")
        async with rig.client.get(rig.base + "/", headers={"accept": "text/html"}) as response:
            assert response.url.path == "/ui"
            assert response.status == 200


async def test_an_unknown_path_is_told_what_there_is() -> None:
    async with running() as rig:
        _, value = await rig.get("/v1/completion")
        assert "/v1/completions" in value["error"]["message"]
        assert "/health" not in value["error"]["message"]
        _, value = await rig.get("/helth")
        assert "/health" in value["error"]["message"]


async def test_every_get_route_takes_head() -> None:
    async with running() as rig:
        await rig.engine("a")
        for route in rig.gateway.routes:
            path = route.path.replace("{id}", "auto")
            async with rig.client.head(rig.base + path) as response:
                assert (response.status == 405) == (route.method == "POST"), path
                assert await response.read() == b""


@pytest.mark.parametrize(
    "query",
    [
        "session=%ff%00%1b", "session=" + "a" * 20_000, "window_minutes=nan", "window_minutes=1e400",
        "window_minutes=" + "9" * 5000, "format=%1b]0;x", "=&&;;=%", "x=1&" * 5000,
        "series=a&since_unix_s=nan&until_unix_s=inf", "after=1e400&limit=%1b", "%1b]0;x=1",
    ],
)  # fmt: skip
async def test_no_query_is_an_internal_error(query: str) -> None:
    async with running() as rig:
        for route in rig.gateway.routes:
            if route.method == "GET":
                path = route.path.replace("{id}", "auto")
                status, _, _ = await raw_get(rig, f"{path}?{query}")
                assert status in {200, 400, 503}, path


async def test_the_tokens_of_a_prompt_are_counted_by_the_engine() -> None:
    async with running() as rig:
        await rig.engine("a")
        status, _, value = await rig.post("/v1/messages/count_tokens", COUNTED)
        assert status == 200
        _, _, answer = await rig.post("/v1/messages", {**COUNTED, "max_tokens": 1})
        assert value == {"input_tokens": answer["usage"]["input_tokens"]}
        status, _, value = await rig.post("/v1/messages/count_tokens", {**COUNTED, "model": "none"})
        assert (status, value["error"]["type"]) == (404, "not_found_error")


async def test_openapi_describes_every_route() -> None:
    async with running() as rig:
        status, value = await rig.get("/openapi.json")
        assert status == 200
        described = {(method.upper(), path) for path, methods in value["paths"].items() for method in methods}
        assert described == {(route.method, route.path) for route in rig.gateway.routes}
        assert {path for path in value["paths"] if "post" in value["paths"][path]} >= set(APIS)
        for path, methods in value["paths"].items():
            names = [parameter["name"] for parameter in methods.get("get", {}).get("parameters", ())]
            assert ("id" in names) == ("{id}" in path)
        for reference in _references(value):
            assert reference.removeprefix("#/components/schemas/") in value["components"]["schemas"]


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [found for item in value.values() for found in _references(item)]
    return [found for item in value for found in _references(item)] if isinstance(value, list) else []


async def test_routes_have_one_summary_each() -> None:
    gateway = Gateway(plane(), "g")
    assert all(route.summary for route in gateway.routes)
    assert len({route.path for route in gateway.routes}) == len(gateway.routes)
