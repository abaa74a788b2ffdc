"""The connections to the endpoints of the latest snapshot, and the meters of their GPU time."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Final

import msgspec

from controlplane.config import PlaneConfig
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.routing.endpoint_table import EndpointLoad, EndpointTable
from controlplane.gateway.proxy.upstream import UpstreamOrigin
from controlplane.gateway.stream_usage import whole_number
from controlplane.gateway.telemetry.accounting import EndpointPriceMeter
from controlplane.http.json_reader import InvalidJson, reader

MODEL_LIST_TIMEOUT_S: Final = 5.0
MAX_MODEL_LIST_BYTES: Final = 1024 * 1024
MAX_CONTEXT_TOKENS: Final = 100_000_000
"""An engine's context length over this is not believed."""


class _ListedModel(msgspec.Struct, gc=False):
    max_model_len: msgspec.Raw = msgspec.Raw()


class _ModelList(msgspec.Struct, gc=False):
    data: list[_ListedModel] = []


_model_list = reader(_ModelList)


class EndpointConnections:
    """The connections to one engine process, and the meter of its GPU time."""

    __slots__ = ("_max_model_len", "held_bytes", "meter", "origin", "refuses_usage")

    def __init__(self, origin: UpstreamOrigin, gpus: float, now_s: float) -> None:
        self.origin = origin
        self.meter = EndpointPriceMeter(gpus, now_s)
        self._max_model_len: int | None = None
        self.held_bytes = 0
        """Bytes of responses that are not streamed and being received."""
        self.refuses_usage = False
        """The engine rejects requests with ``stream_options``."""

    async def max_model_len(self, request_id: str) -> int | None:
        """The engine's context length in tokens, from its model list; None if the list does not contain it.
        Read only when a stream is resumed. Raises :class:`UpstreamFailure`."""
        if self._max_model_len is None:
            self._max_model_len = await self._read_max_model_len(request_id)
        return self._max_model_len

    async def _read_max_model_len(self, request_id: str) -> int | None:
        connection = await self.origin.acquire(fresh=True)
        try:
            connection.send(self.origin.request("GET", "/v1/models", request_id, b""))
            body = bytearray()
            async with asyncio.timeout(MODEL_LIST_TIMEOUT_S):
                await connection.head()
                while data := await connection.read():
                    body += data
                    if len(body) > MAX_MODEL_LIST_BYTES:
                        return None
            models = _model_list(bytes(body)).data
            length = whole_number(models[0].max_model_len) if models else None
            return length if length is not None and 0 < length <= MAX_CONTEXT_TOKENS else None
        except (TimeoutError, InvalidJson):
            return None
        finally:
            connection.close()


class ConnectionTable:
    """The connections of one gateway replica, by engine process
    (:func:`~controlplane.core.routing.endpoint_table.load_key`)."""

    def __init__(self, config: PlaneConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connect_timeout_s = config.gateway.connect_timeout_s
        self._gpus = {tier.name: tier.engine_gpus or 1.0 for tier in config.tiers}
        self._by_key: dict[str, EndpointConnections] = {}

    def to(self, load: EndpointLoad) -> EndpointConnections:
        """The connections to an endpoint that routing chose. Raises ValueError if its address is
        invalid."""
        connections = self._by_key.get(load.key)
        if connections is None:
            connections = self._by_key[load.key] = self._new(load.endpoint)
        return connections

    def prune(self, endpoint_table: EndpointTable) -> None:
        """Remove the processes that a new snapshot no longer lists. Requests running on them continue."""
        living = {load.key for load in endpoint_table.by_endpoint_id.values()}
        for key in [key for key in self._by_key if key not in living]:
            self._by_key.pop(key).origin.close()

    def close(self) -> None:
        """Close all idle connections."""
        for connections in self._by_key.values():
            connections.origin.close()

    def _new(self, endpoint: Endpoint) -> EndpointConnections:
        origin = UpstreamOrigin(
            endpoint.base_url, endpoint.secret, connect_timeout_s=self._connect_timeout_s, loop=self._loop
        )
        # An engine without a GPU is charged as one device.
        return EndpointConnections(origin, self._gpus.get(endpoint.tier, 1.0), monotonic())
