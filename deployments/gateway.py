"""The gateway as a Serve deployment: the REST interface on Serve's ingress and on a port of its own.

A replica runs in one event loop (Serve's): the application, the gateway's own port, and background tasks that
pull snapshots from the controller, report load to it, and read the engines' own load. Everything continues
while the controller is unavailable.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import structlog
from ray import serve

from controlplane import logs
from controlplane.config import PlaneConfig
from controlplane.controller.api import ControllerApi
from controlplane.controller.client import (
    ControllerLink,
    RemoteController,
    pull_keys,
    pull_snapshots,
    report_gateway,
)
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.domain.endpoint import EndpointState
from controlplane.gateway.gateway import Gateway
from controlplane.paths import run_dir
from controlplane.planning.tier_specs import tier_specs
from deployments.background import BackgroundTasks
from deployments.engine_load import watch_engines
from deployments.ingress import ignore_trailers
from deployments.node_figures import watch_nodes
from deployments.ray_metrics import mirror_metrics

MAX_ONGOING_REQUESTS = 10_000
"""Serve's limit of requests per replica. It exceeds that of the gateway's own admission queue, which is the
real limit."""
DRAIN_S = 60.0
"""How long a stopping gateway waits for its requests in flight."""
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 5.0
"""After three checks without an answer in this time, Serve kills the replica and starts another."""
DRAINING_REPORT_S = 0.25
"""The interval between load reports while an endpoint drains: its replica waits until the count is zero."""

log = structlog.stdlib.get_logger(__name__)


@serve.ingress()
class GatewayReplica:
    """One gateway. ``tiers`` are handles that make the tiers part of the application; no request uses
    them."""

    async def __init__(self, config: PlaneConfig, *tiers: Any) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        self._id = f"gateway-{context.replica_id.unique_id}"
        self._config = config
        self._node_id = ray.get_runtime_context().get_node_id()
        logs.setup(
            config.controller.log_format,
            config.controller.log_level,
            file=run_dir() / "logs" / f"{self._id}.log",
            component="gateway",
            gateway_id=self._id,
        )
        ignore_trailers()  # Serve starts the ingress of this replica after its constructor
        self._gateway = Gateway(config, self._id)
        self._report_now = asyncio.Event()
        self._keys_changed = asyncio.Event()
        # A request for a tier that is scaled to zero has to be reported to the controller at once.
        self._gateway.traffic.on_asleep = self._report_now.set
        if config.gateway.traces_endpoint:
            # Imported only where it is used: it takes a third of a second.
            from controlplane.gateway.telemetry.tracing import otlp_tracing

            endpoint, ratio = config.gateway.traces_endpoint, config.gateway.traces_ratio
            self._gateway.trace(otlp_tracing(endpoint, self._id, ratio))
        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        await self._gateway.start(config.gateway.host, config.gateway.port or None, address)
        self._link = ControllerLink(config.controller)
        self._gateway.controller = RemoteController(self._link)
        self._tasks = BackgroundTasks(
            pull_snapshots(self._link, self._apply),
            pull_keys(self._link, self._keys_changed, self._gateway.apply_keys),
            watch_engines(self._gateway),
            watch_nodes(self._gateway),
            mirror_metrics(self._gateway),
            report_gateway(
                self._link,
                config.controller,
                partial(tier_specs, config),
                self._info,
                interval_s=self._report_interval_s,
                report_now=self._report_now,
                delivered=self._delivered,
            ),
        )
        log.info("gateway started", host=config.gateway.host, port=config.gateway.port)

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application for Serve's ingress."""
        return self._gateway.app

    async def check_health(self) -> None:
        """Raise if a background task has ended: this replica's snapshot would no longer be updated."""
        self._tasks.check()

    async def __del__(self) -> None:  # Serve awaits it
        await self._gateway.drain(DRAIN_S)
        await self._tasks.cancel()
        await self._link.notify(ControllerApi.gateway_gone, self._id, "stopped")
        log.info("gateway stopped")

    def _apply(self, snapshot: ClusterSnapshot) -> None:
        self._gateway.apply(snapshot)
        if self._gateway.needs_keys(snapshot):
            self._keys_changed.set()
        if self._drains():
            self._report_now.set()

    def _info(self) -> GatewayInfo:
        known = self._gateway.snapshot
        seen = (known.epoch, known.version) if known else ("", 0)
        return replace(self._gateway.info(), node_id=self._node_id, snapshot=seen)

    def _delivered(self, info: GatewayInfo) -> None:
        if info.ended is not None:
            self._gateway.request_log.delivered(info.ended.number)

    def _report_interval_s(self) -> float:
        return DRAINING_REPORT_S if self._drains() else self._config.controller.heartbeat_s

    def _drains(self) -> bool:
        known = self._gateway.snapshot
        endpoints = known.endpoints if known else ()
        return any(endpoint.state == EndpointState.DRAINING for endpoint in endpoints)


def gateway_application(config: PlaneConfig, *tiers: serve.Application) -> serve.Application:
    """The gateway deployment, bound to the tiers behind it."""
    deployment = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": config.gateway.cpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        # A change of the configuration replaces every replica. The new one takes requests before the old one
        # stops; until then they share the port.
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=DRAIN_S + 10.0,
        # A hung replica still has its share of the port's new connections: Serve kills it after three checks.
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )(GatewayReplica)
    application: serve.Application = deployment.bind(config, *tiers)
    return application
