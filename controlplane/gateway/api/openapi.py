"""``GET /openapi.json``: the gateway's routes for tools that read OpenAPI, generated from the routes
themselves."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, NamedTuple

import msgspec

from controlplane import __version__
from controlplane.core.access.roles import Permission
from controlplane.gateway.api.agents import MAX_BATCH, ChatRequest
from controlplane.gateway.request_body import MAX_MODELS, MAX_NAME_CHARS
from controlplane.http.messages import Request, Responder

Handle = Callable[[Request, Responder], Awaitable[None]]


class GatewayRoute(NamedTuple):
    """One route. ``path`` may end in ``{…}``, which stands for the rest of an address, slashes included."""

    method: str
    path: str
    summary: str
    handle: Handle
    permission: Permission
    """What its principal needs."""


_COMPONENT: Final = "#/components/schemas/{name}"
_PATH_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_NAME: Final = {"type": "string", "maxLength": MAX_NAME_CHARS}
_INFERENCE: Final = {
    "type": "object",
    "description": "What the engine takes. The gateway reads only these members.",
    "additionalProperties": True,
    "properties": {
        "model": {**_NAME, "default": "auto", "description": "A tier, a model, or auto."},
        "models": {"type": "array", "items": _NAME, "maxItems": MAX_MODELS},
        "stream": {"type": "boolean", "default": False},
        "metadata": {"type": "object"},
    },
}
_ERROR: Final = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_QUERIES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "/usage": {"session": _NAME},
    "/report": {
        "window_minutes": {"type": "number", "minimum": 1, "maximum": 43200, "default": 60},
        "format": {"type": "string", "enum": ["json", "html"], "default": "json"},
    },
}


def document(routes: Iterable[GatewayRoute]) -> dict[str, Any]:
    """The OpenAPI document of ``routes``."""
    (chat,), components = msgspec.json.schema_components([ChatRequest], ref_template=_COMPONENT)
    chats = {"type": "array", "items": chat, "maxItems": MAX_BATCH}
    bodies = {
        "/chat": chat,
        "/batch": {"anyOf": [chats, {"type": "object", "properties": {"requests": chats}}]},
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "responses": {
                "200": {"description": "OK"},
                "default": {"description": "An error", "content": _json({"$ref": _reference("Error")})},
            },
        }
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PATH_PARAMETER.findall(route.path)
        ]
        parameters += [
            {"name": name, "in": "query", "schema": schema}
            for name, schema in _QUERIES.get(route.path, {}).items()
        ]
        if parameters:
            operation["parameters"] = parameters
        if route.method == "POST":
            schema = bodies.get(route.path, {"$ref": _reference("Inference")})
            operation["requestBody"] = {"required": True, "content": _json(schema)}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "tierplane", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Inference": _INFERENCE, "Error": _ERROR}},
    }


def _reference(name: str) -> str:
    return _COMPONENT.format(name=name)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
