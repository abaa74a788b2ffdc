"""Where requests can go: the endpoints of the last snapshot with their connections and meters."""

from __future__ import annotations

import asyncio
from time import monotonic

from controlplane.config import PlaneConfig
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.routing.endpoint_table import EndpointLoad, EndpointTable
from controlplane.gateway.proxy.upstream import UpstreamOrigin
from controlplane.gateway.telemetry.accounting import EndpointPriceMeter


class EndpointConnections:
    """One engine process: its address, and what its time costs."""

    __slots__ = ("devices", "max_model_len", "meter", "origin")

    def __init__(self, origin: UpstreamOrigin, devices: float, now_s: float) -> None:
        self.origin = origin
        self.devices = devices
        self.meter = EndpointPriceMeter(devices, now_s)
        self.max_model_len: int | None = None
        """The engine's context length in tokens; asked for when a stream is resumed."""


class ConnectionTable:
    """The sites of one gateway replica, by :func:`~controlplane.core.routing.endpoint_table.load_key`."""

    def __init__(self, config: PlaneConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connect_timeout_s = config.gateway.connect_timeout_s
        self._devices = {tier.name: tier.engine_gpus or 1.0 for tier in config.tiers}
        self._sites: dict[str, EndpointConnections] = {}

    def site(self, load: EndpointLoad) -> EndpointConnections:
        """The site of an endpoint that routing chose."""
        site = self._sites.get(load.key)
        if site is None:
            site = self._sites[load.key] = self._new(load.endpoint)
        return site

    def prune(self, endpoint_table: EndpointTable) -> None:
        """Forget the processes that a new snapshot no longer has; what runs there goes on."""
        living = {load.key for load in endpoint_table.by_endpoint_id.values()}
        for key in [key for key in self._sites if key not in living]:
            self._sites.pop(key).origin.close()

    def close(self) -> None:
        """Close all idle connections."""
        for site in self._sites.values():
            site.origin.close()

    def _new(self, endpoint: Endpoint) -> EndpointConnections:
        origin = UpstreamOrigin(
            endpoint.base_url, endpoint.secret, connect_timeout_s=self._connect_timeout_s, loop=self._loop
        )
        return EndpointConnections(origin, self._devices.get(endpoint.tier, 1.0), monotonic())
