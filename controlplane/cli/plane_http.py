"""Queries to a plane's controller through its gateway (``GET /plane/…``)."""

from __future__ import annotations

import http.client
import inspect
import os
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, cast, get_type_hints
from urllib.parse import urlencode, urlsplit

import msgspec

from controlplane.controller.api import Method, P, R
from controlplane.controller.keys import read_operator_key
from controlplane.errors import SetupError
from controlplane.gateway.api.operator_queries import PREFIX
from controlplane.paths import run_dir

TIMEOUT_S: Final = 6.0
"""Longer than a gateway waits for its controller."""
MAX_BYTES: Final = 256 * 2**20


class GatewayUnreachable(Exception):
    """The gateway did not answer, or could not ask the controller."""


def query(url: str, method: Method[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of a query, one of those in
    :data:`~controlplane.gateway.api.operator_queries.ARGUMENTS`.

    Raises SetupError if the arguments are refused, and GatewayUnreachable if there is no result.
    """
    bound = inspect.signature(method).bind(None, *args, **kwargs).arguments
    values = {name: value for name, value in bound.items() if name != "self"}
    status, body = _get(url, f"{PREFIX}{method.__name__}", values)
    try:
        if status == http.client.BAD_REQUEST:
            raise SetupError(str(msgspec.json.decode(body)["error"]["message"]))
        if status != http.client.OK:
            raise GatewayUnreachable(f"status {status}")
        return cast("R", msgspec.json.decode(body, type=_result_type(method), strict=False))
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise GatewayUnreachable(f"the response can't be read: {error}") from error


def _get(url: str, path: str, values: Mapping[str, Any]) -> tuple[int, bytes]:
    parts = urlsplit(url)
    query = urlencode({name: _text(value) for name, value in values.items()})
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        key = os.environ.get("TIERPLANE_KEY", "") or read_operator_key(run_dir())
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
        response = connection.getresponse()
        body = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise GatewayUnreachable(str(error)) from error
    finally:
        connection.close()
    if len(body) > MAX_BYTES:
        raise GatewayUnreachable(f"the response is over {MAX_BYTES // 2**20} MiB")
    return response.status, body


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


@cache
def _result_type(method: Any) -> Any:
    return get_type_hints(method)["return"]
