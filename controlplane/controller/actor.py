"""The controller as a Ray actor: its remote interface, in one event loop with the periodic loops.

There is one named, detached actor per namespace. It needs no CPU, Ray restarts it when its process dies, and
any process that finds none creates it. Decisions are made in
:class:`~controlplane.controller.controller.Controller`; here and in :mod:`controlplane.controller.loops` is
what touches Ray, engines, disk and clock.
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import structlog

from controlplane import logs
from controlplane.config import ControllerConfig
from controlplane.config.alerts import AlertsConfig
from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller import stored_requests
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.controller.api import ControllerApi, R
from controlplane.controller.controller import GC_THRESHOLDS, Controller, ControllerRules
from controlplane.controller.handle import CONTROLLER_NAME, ControllerHandle
from controlplane.controller.keys import KeyRegistry, KeyRequest, KeyResponse, local_operator
from controlplane.controller.loops import SCALING, ControlLoops
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.ray_cordons import release_all_gpus
from controlplane.controller.recorder import Recorder
from controlplane.controller.registry import WARMING_REPORTS, Registry
from controlplane.controller.reports import Reports
from controlplane.controller.saved_state import SavedState, stored_last_events
from controlplane.controller.scaling import PlaneScaler
from controlplane.core.access.keys import KeyRecord, KeyTable
from controlplane.core.alerts.views import AlertsResponse
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.domain.event import Event
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.leases import GpuPart, LeaseResponse
from controlplane.core.gpus.node_views import NodeView
from controlplane.core.gpus.views import GpuView
from controlplane.core.placement.gangs import GangShape
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reconcile.commands import (
    ActionOutcome,
    ActionResponse,
    ReportResponse,
    StartPermission,
)
from controlplane.core.reconcile.migrations import Activity
from controlplane.core.reconcile.reconcile import ReconcileRules
from controlplane.core.reconcile.replica_targets import TierTarget
from controlplane.core.reports.recorded_traffic import Point
from controlplane.core.reports.report import PlaneReport
from controlplane.core.telemetry.stalled_engine import StallRules
from controlplane.core.traffic.request_log import RequestsView, SessionOrder, SessionsView, UsageBy, UsageView
from controlplane.node_agent.ray_actor import stop_node_agents
from controlplane.paths import run_dir

IN_MEMORY = ":memory:"

V = TypeVar("V", RequestsView, SessionsView, UsageView)

log = structlog.stdlib.get_logger(__name__)


class ControllerActor:
    """The actor's body; :class:`~controlplane.controller.api.ControllerApi` documents its methods."""

    async def __init__(self, config: ControllerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.setup(
            config.log_format,
            config.log_level,
            file=run_dir() / "logs" / "controller.log",
            component="controller",
        )
        gc.set_threshold(*GC_THRESHOLDS)
        self._config = config
        self._recorder = await asyncio.to_thread(Recorder, store_path(config))
        self._registry = Registry(
            epoch=f"{int(time.time()):x}-{secrets.token_hex(4)}",
            heartbeat_s=config.heartbeat_s,
            now_s=time.monotonic,
            unix_s=time.time,
        )
        self._controller = Controller(
            self._registry,
            heartbeat_s=config.heartbeat_s,
            now_s=time.monotonic,
            unix_s=time.time,
            rules=controller_rules(config),
            # If no controller ran before, every process is still trying to reach one, and none is in the
            # pause between two reports.
            settle_s=config.heartbeat_s * (WARMING_REPORTS if _restarted() else 1),
        )
        self._scaler = PlaneScaler(self._controller, config.scaling)
        # The webhooks' secrets are in the environment of the node on which Ray has (re)started this process.
        delivery = AlertDelivery(config.alerts.webhooks, os.environ, config.namespace)
        self._delivery = delivery
        self._alerting = Alerting(
            self._controller,
            config.alerts,
            delivery,
            store_warning=lambda: self._recorder.warning,
            unreadable=lambda: self._recorder.unreadable,
        )
        self._reports = Reports(
            self._controller, self._recorder, config.reports, config.scaling.cost_per_gpu_hour
        )
        nodes = NodeWatch(
            config.namespace,
            config.sample_interval_s,
            self._controller.observe_node,
            stored_last_events(self._recorder),
        )
        self._keys = KeyRegistry(time.time, self._note_key)
        try:
            self._keys.add_fixed([local_operator(run_dir(), time.time())])
        except OSError as error:
            log.warning("the key for commands on this machine can't be written", error=str(error))
        self._saved = SavedState(
            self._recorder,
            registry=self._registry,
            controller=self._controller,
            scaler=self._scaler,
            alerting=self._alerting,
            nodes=nodes,
            keys=self._keys,
        )
        self._saved.restore_gpus()
        self._new_snapshot = asyncio.Event()
        self._version = self._registry.version
        self._loops = ControlLoops(
            config,
            registry=self._registry,
            controller=self._controller,
            scaler=self._scaler,
            alerting=self._alerting,
            reports=self._reports,
            nodes=nodes,
            saved=self._saved,
            on_change=self._changed,
            on_idle=self._shut_down,
        )
        delivery.start()
        await self._loops.start()
        self._changed()

    # --- replicas and gateways ------------------------------------------------------------------------------

    async def declare(
        self,
        tiers: tuple[TierSpec, ...],
        heartbeat_s: float,
        scaling: ControllerScalingConfig,
        alerts: AlertsConfig,
    ) -> None:
        """See :meth:`Controller.declare`, :meth:`PlaneScaler.configure` and :meth:`Alerting.configure`."""
        self._controller.declare(tiers, heartbeat_s)
        self._scaler.configure(scaling)
        self._alerting.configure(alerts)

    async def register(self, endpoint: Endpoint) -> None:
        """See :meth:`Controller.register`."""
        self._controller.register(endpoint)
        self._changed()

    async def report(self, endpoint: Endpoint) -> ReportResponse:
        """See :meth:`Controller.report`."""
        response = self._controller.report(endpoint)
        self._changed()
        return response

    async def deregister(self, endpoint_id: str, reason: str) -> None:
        """See :meth:`Controller.deregister`."""
        self._controller.deregister(endpoint_id, reason)
        self._changed()

    async def gateway_report(self, info: GatewayInfo) -> bool:
        """See :meth:`Controller.gateway_report` and :meth:`Recorder.add_requests`."""
        if self._scaler.wakes(info):
            self._loops.run_soon(SCALING)
        if info.ended is not None:
            self._recorder.add_requests(info.gateway_id, info.ended)
        known = self._controller.gateway_report(info)
        self._changed()
        return known

    async def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """See :meth:`Controller.gateway_gone`."""
        self._controller.gateway_gone(gateway_id, reason)
        self._changed()

    async def still_running(self, endpoint_id: str) -> int | None:
        """See :meth:`Registry.still_running`."""
        return self._registry.still_running(endpoint_id)

    async def snapshot(self, epoch: str, version: int, wait_s: float) -> ClusterSnapshot | None:
        """A long poll; see :meth:`Registry.snapshot`."""
        registry = self._registry
        if epoch == registry.epoch and version >= registry.version:
            try:
                await asyncio.wait_for(self._new_snapshot.wait(), wait_s)
            except TimeoutError:
                return None
        return registry.snapshot(secrets=True)

    # --- leases ---------------------------------------------------------------------------------------------

    async def lease_gpus(
        self, holder: str, generation: int, node_id: str, shape: GangShape, tier: str = ""
    ) -> LeaseResponse:
        """See :meth:`Controller.lease_gpus`."""
        return self._committed(self._controller.lease_gpus(holder, generation, node_id, shape, tier))

    async def restore_lease(
        self, holder: str, generation: int, node_id: str, parts: tuple[GpuPart, ...]
    ) -> LeaseResponse:
        """See :meth:`Controller.restore_lease`."""
        return self._committed(self._controller.restore_lease(holder, generation, node_id, parts))

    async def release_lease(self, holder: str, generation: int | None = None) -> LeaseResponse:
        """See :meth:`Controller.release_lease`."""
        return self._committed(self._controller.release_lease(holder, generation))

    async def may_start(self, tier: str) -> StartPermission:
        """See :meth:`Controller.may_start`."""
        return self._controller.may_start(tier)

    # --- scaling --------------------------------------------------------------------------------------------

    async def targets(self) -> Mapping[str, TierTarget]:
        """See :meth:`Controller.targets`."""
        return self._controller.targets()

    async def scaling(self) -> ScalingReport:
        """See :meth:`PlaneScaler.report`."""
        return self._scaler.report()

    async def scale(
        self, tier: str, replicas: int | None, for_s: float | None = None, reason: str = ""
    ) -> ActionResponse:
        """See :meth:`PlaneScaler.scale`."""
        response = self._committed(self._scaler.scale(tier, replicas, for_s, reason))
        self._loops.run_soon(SCALING)
        return response

    # --- operators ------------------------------------------------------------------------------------------

    async def cordon(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.cordon`."""
        return self._committed(self._controller.cordon(subject, reason))

    async def uncordon(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.uncordon`."""
        return self._committed(self._controller.uncordon(subject, reason))

    async def drain(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.drain`."""
        return self._committed(self._controller.drain(subject, reason))

    async def restart(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.restart`."""
        return self._committed(self._controller.restart(subject, reason))

    async def acknowledge_alert(self, rule: str, subject: str, by: str) -> ActionResponse:
        """See :meth:`Alerting.acknowledge`."""
        return self._committed(self._alerting.acknowledge(rule, subject, by))

    async def silence_alerts(
        self, rule: str, subject: str, for_s: float, reason: str, by: str
    ) -> ActionResponse:
        """See :meth:`Alerting.silence`."""
        return self._committed(self._alerting.silence(rule, subject, for_s, reason=reason, by=by))

    async def unsilence_alerts(self, number: int, by: str) -> ActionResponse:
        """See :meth:`Alerting.unsilence`."""
        return self._committed(self._alerting.unsilence(number, by))

    # --- keys -----------------------------------------------------------------------------------------------

    async def create_key(self, request: KeyRequest, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.create`."""
        return await self._stored(self._keys.create(request, by))

    async def revoke_key(self, subject: str, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.revoke`."""
        return await self._stored(self._keys.revoke(subject, by))

    async def rotate_key(self, subject: str, grace_s: float, by: str) -> KeyResponse:
        """See :meth:`KeyRegistry.rotate`."""
        return await self._stored(self._keys.rotate(subject, grace_s, by))

    async def keys(self) -> tuple[KeyRecord, ...]:
        """See :attr:`KeyRegistry.records`."""
        return self._keys.records

    async def key_table(self) -> KeyTable:
        """See :attr:`KeyRegistry.table`."""
        return self._keys.table

    # --- queries --------------------------------------------------------------------------------------------

    async def status(self) -> tuple[ClusterSnapshot, tuple[TierSpec, ...], tuple[Event, ...]]:
        """The snapshot without secrets, the configured tiers, and recent events."""
        registry = self._registry
        return registry.snapshot(secrets=False), registry.tiers, registry.events

    async def gpus(self) -> tuple[GpuView, ...]:
        """See :meth:`Controller.gpus`."""
        return self._controller.gpus()

    async def nodes(self) -> tuple[NodeView, ...]:
        """See :meth:`Controller.nodes`."""
        return self._controller.nodes()

    async def alerts(self) -> AlertsResponse:
        """See :meth:`Alerting.response`."""
        return self._alerting.response()

    async def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """See :meth:`Recorder.events`."""
        return await asyncio.to_thread(self._recorder.events, after, limit)

    async def history(
        self, series: tuple[str, ...], since_unix_s: float, until_unix_s: float
    ) -> Mapping[str, list[Point]]:
        """See :meth:`Store.history`."""
        store = self._recorder.store
        return {
            name: await asyncio.to_thread(store.history, name, since_unix_s, until_unix_s) for name in series
        }

    async def plane_report(self, window_minutes: float = 60.0) -> PlaneReport:
        """See :meth:`Reports.report`."""
        return await self._reports.report(window_minutes)

    async def requests(
        self,
        since_unix_s: float,
        slow: bool = False,
        failed: bool = False,
        tier: str = "",
        session: str = "",
        limit: int = 50,
        key: str = "",
        team: str = "",
    ) -> RequestsView:
        """See :func:`stored_requests.requests`."""
        query = partial(
            stored_requests.requests,
            since_unix_s=since_unix_s,
            slow=slow,
            failed=failed,
            tier=tier,
            session=session,
            limit=limit,
            key=key,
            team=team,
        )
        return await self._priced(query)

    async def sessions(
        self, since_unix_s: float, order: SessionOrder = SessionOrder.COST, limit: int = 20
    ) -> SessionsView:
        """See :func:`stored_requests.sessions`."""
        query = partial(
            stored_requests.sessions, since_unix_s=since_unix_s, order=SessionOrder(order), limit=limit
        )
        return await self._priced(query)

    async def usage(
        self,
        since_unix_s: float,
        until_unix_s: float,
        by: UsageBy = UsageBy.TEAM,
        key: str = "",
        team: str = "",
        limit: int = 1000,
    ) -> UsageView:
        """See :func:`stored_requests.usage`."""
        query = partial(
            stored_requests.usage,
            since_unix_s=since_unix_s,
            until_unix_s=until_unix_s,
            by=UsageBy(by),
            key=key,
            team=team,
            limit=limit,
        )
        return await self._priced(query)

    async def _priced(self, query: Callable[[sqlite3.Connection], V]) -> V:
        """The result of a query to the store, with the price of GPU time."""
        found = await asyncio.to_thread(self._recorder.store.read, query)
        return replace(found, cost_per_gpu_hour=self._config.scaling.cost_per_gpu_hour)

    async def activity(self) -> Activity:
        """See :meth:`Controller.activity`."""
        activity = self._controller.activity()
        return replace(activity, store_warning=self._recorder.warning, tick_s=self._loops.tick_s)

    # --- after a change -------------------------------------------------------------------------------------

    def _committed(self, response: R) -> R:
        """``response``, after the change that led to it was recorded and saved."""
        self._changed()
        self._saved.save_if_changed()
        return response

    async def _stored(self, response: KeyResponse) -> KeyResponse:
        """``response``, after the change that led to it was written to the store, and gateways were told."""
        await asyncio.to_thread(self._recorder.put_records, self._keys.take_unsaved())
        self._changed()
        if response.outcome is ActionOutcome.DONE and self._recorder.warning:
            return replace(response, reason=f"{response.reason}, but not stored: {self._recorder.warning}")
        return response

    def _note_key(self, kind: str, subject: str, reason: str, by: str) -> None:
        self._registry.note(kind, subject, reason, actor=by)

    def _changed(self) -> None:
        """Record new events, and answer the long polls if there is a new snapshot."""
        self._registry.publish_keys(self._keys.table.version)
        self._saved.record_events()
        if self._registry.version != self._version:
            self._version = self._registry.version
            self._new_snapshot.set()
            self._new_snapshot = asyncio.Event()

    async def _shut_down(self) -> None:
        log.info("the plane is gone, the controller ends")
        await self._delivery.close()
        await asyncio.to_thread(release_all_gpus, self._config.namespace)
        await asyncio.to_thread(stop_node_agents, self._config.namespace)
        await asyncio.to_thread(self._recorder.close)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def store_path(config: ControllerConfig) -> Path | None:
    """The store's file; None: in memory only."""
    if config.store_path == IN_MEMORY:
        return None
    if config.store_path:
        return Path(config.store_path).expanduser()
    return run_dir() / f"controller-{config.namespace}.sqlite"


def controller_rules(config: ControllerConfig) -> ControllerRules:
    """The rules as configured."""
    return ControllerRules(
        GpuRules(hot_for_s=config.overheat_after_s, hold_initial_s=config.cordon_hold_s),
        ReconcileRules(crash_limit=config.crash_limit),
        StallRules(after_s=config.hang_after_s),
    )


def get_or_create_controller(config: ControllerConfig) -> ControllerHandle:
    """The controller of the configuration's namespace, created if there is none. Blocks; not for an event
    loop."""
    body: type[ControllerApi] = ControllerActor
    actor: Any = ray.remote(body)
    handle = actor.options(
        name=CONTROLLER_NAME,
        namespace=config.namespace,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        # If the process dies during a call, the caller gets an error and repeats the call itself.
        max_task_retries=0,
        # Each gateway holds one call open.
        max_concurrency=10_000,
    ).remote(config)
    return ControllerHandle(handle)


def _restarted() -> bool:
    """Whether Ray has restarted this actor after its process died."""
    with warnings.catch_warnings():
        # Ray has deprecated it without a replacement.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
