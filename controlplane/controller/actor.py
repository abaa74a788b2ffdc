"""The controller as a Ray actor: observe → decide → revalidate → apply → record.

There is one named, detached actor per namespace. It needs no CPU, Ray restarts it when its process dies, and
whoever finds none creates it. Everything is decided in :class:`~controlplane.controller.controller.Registry`;
here is what touches Ray, engines, disk and clock. Samples are taken in as they arrive, between ticks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from controlplane import logs
from controlplane.config import ControllerConfig
from controlplane.config.alerts import AlertsConfig
from controlplane.config.scaling import ControllerScalingConfig
from controlplane.controller import checkpoint
from controlplane.controller.alert_loop import AlertLoop
from controlplane.controller.api import ControllerApi
from controlplane.controller.controller import GC_THRESHOLDS, Controller, ControllerRules
from controlplane.controller.handle import CONTROLLER_NAME, ControllerHandle
from controlplane.controller.node_watch import NodeWatch
from controlplane.controller.operator_actions import OperatorActions
from controlplane.controller.ray_cordons import hold_gpus, let_go_of_all
from controlplane.controller.recorder import Recorder
from controlplane.controller.registry import WARMING_REPORTS, Registry
from controlplane.controller.reports import Reports
from controlplane.controller.scaling import Scaling
from controlplane.controller.store import Point
from controlplane.core.alerts.views import AlertsResponse
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.domain.event import Event
from controlplane.core.gpus.findings import GpuRules
from controlplane.core.gpus.leases import GpuPart, LeaseResponse
from controlplane.core.gpus.views import GpuView
from controlplane.core.json_values import StoredState
from controlplane.core.placement.gangs import GangShape
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reconcile.commands import ActionResponse, ReportResponse, StartPermission
from controlplane.core.reconcile.migrations import Activity
from controlplane.core.reconcile.reconcile import ReconcileRules
from controlplane.core.reconcile.replica_targets import TierTarget
from controlplane.core.reports.report import PlaneReport
from controlplane.core.telemetry.stalled_engine import StallRules
from controlplane.engines.metrics_scraper import EngineScraper, ScrapeTarget
from controlplane.node_agent.ray_actor import stop_node_agents
from controlplane.paths import run_dir

IDLE_EXIT_S = 300.0
"""A controller that knows nobody for this long ends: nothing of a plane that is gone stays behind."""
SAVE_INTERVAL_S = 30.0
"""State that changes without an event (counters of a GPU that is out of use) is saved this often."""
CORDONS_INTERVAL_S = 30.0
"""How often it is looked whether what should be held in Ray still is."""
SCRAPE_PAUSE = 4.0
"""Between two rounds through the engines there is so many times the work of one."""
IN_MEMORY = ":memory:"

log = structlog.stdlib.get_logger(__name__)


class ControllerActor:
    """The actor's body: the control loop in an event loop, with a long poll for snapshots."""

    async def __init__(self, config: ControllerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        logs.setup(
            config.log_format,
            config.log_level,
            file=run_dir() / "logs" / "controller.log",
            component="controller",
        )
        gc.set_threshold(*GC_THRESHOLDS)
        self._config = config
        self._shift_s = time.time() - time.monotonic()
        self._keeper = checkpoint.CheckpointWriter(self._shift_s)
        self._recorder = await asyncio.to_thread(Recorder, store_path(config))
        again = _made_again()
        self._controller = Controller(
            Registry(
                epoch=f"{int(time.time()):x}-{secrets.token_hex(4)}",
                heartbeat_s=config.heartbeat_s,
                now_s=time.monotonic,
                unix_s=time.time,
            ),
            heartbeat_s=config.heartbeat_s,
            now_s=time.monotonic,
            unix_s=time.time,
            rules=control_rules(config),
            # One that was never there before has nobody to wait for but those it has just missed.
            settle_s=config.heartbeat_s * (WARMING_REPORTS if again else 1),
        )
        self._scaling = Scaling(self._controller, config.scaling)
        self._operations = OperatorActions(self._controller)
        self._reports = Reports(
            *(self._controller, self._recorder, config.reports, config.scaling.cost_per_gpu_hour),
            heartbeat_s=config.heartbeat_s,
            unix_s=lambda: time.monotonic() + self._shift_s,
        )
        self._hurry = asyncio.Event()
        self._alerts = AlertLoop(
            *(self._controller, config),
            shift_s=self._shift_s,
            store_warning=lambda: self._recorder.warning,
        )
        self._change = asyncio.Event()
        self._version = self._controller.registry.version
        self._cluster: set[str] | None = None
        self._ray_gpus: dict[str, int] = {}
        self._held: dict[str, str] | None = None
        self._held_s = 0.0
        self._saved = (-1, 0.0)
        self._noted = 0
        self._tick_s = 0.0
        heard = {node: (epoch, seq) for node, (epoch, seq) in self._recorder.state.get(_HEARD, {}).items()}
        self._watch = NodeWatch(
            config.namespace, config.sample_interval_s, self._controller.observe_node, heard
        )
        stored = StoredState(self._recorder.state)
        checkpoint.restore_gpus(stored, self._controller.fleet, self._shift_s)
        _warn_of_damage(stored)
        self._loops = [
            asyncio.create_task(loop)
            for loop in (
                self._look_loop(),
                self._tick_loop(),
                self._scrape_loop(),
                self._cordon_loop(),
                self._scaling_loop(),
            )
        ]
        alerts = self._alerts.run(lambda: self._cluster is not None, self._record)
        self._loops.append(asyncio.create_task(alerts))
        self._wake()

    # --- replicas and gateways ------------------------------------------------------------------------------

    async def declare(
        self,
        tiers: tuple[TierSpec, ...],
        heartbeat_s: float,
        scaling: ControllerScalingConfig,
        alerts: AlertsConfig,
    ) -> None:
        """What the configuration asks for; see :meth:`Registry.declare`, :meth:`Scaling.configure` and
        :meth:`AlertLoop.configure`."""
        self._controller.declare(tiers, heartbeat_s)
        self._scaling.configure(scaling)
        self._alerts.configure(alerts)

    async def register(self, endpoint: Endpoint) -> None:
        """See :meth:`Registry.register`."""
        self._controller.register(endpoint)
        self._wake()

    async def report(self, endpoint: Endpoint) -> ReportResponse:
        """See :meth:`Controller.report`."""
        answer = self._controller.report(endpoint)
        self._wake()
        return answer

    async def deregister(self, endpoint_id: str, reason: str) -> None:
        """See :meth:`Controller.deregister`."""
        self._controller.deregister(endpoint_id, reason)
        self._wake()

    async def gateway_report(self, info: GatewayInfo) -> bool:
        """See :meth:`Controller.gateway_report`."""
        if self._scaling.wakes(info):
            self._hurry.set()
        known = self._controller.gateway_report(info)
        self._wake()
        return known

    async def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """See :meth:`Registry.gateway_gone`."""
        self._controller.gateway_gone(gateway_id, reason)
        self._wake()

    async def still_running(self, endpoint_id: str) -> int | None:
        """See :meth:`Registry.still_running`."""
        return self._controller.registry.still_running(endpoint_id)

    async def snapshot(self, epoch: str, version: int, wait_s: float) -> ClusterSnapshot | None:
        """For gateways, with secrets: what is newer than ``(epoch, version)``; None if nothing is for
        ``wait_s``."""
        registry = self._controller.registry
        if epoch == registry.epoch and version >= registry.version:
            try:
                await asyncio.wait_for(self._change.wait(), wait_s)
            except TimeoutError:
                return None
        return registry.snapshot(secrets=True)

    # --- leases ---------------------------------------------------------------------------------------------

    async def lease_gpus(
        self, holder: str, generation: int, node_id: str, shape: GangShape, tier: str = ""
    ) -> LeaseResponse:
        """Exact GPUs for a replica on a node. GRANTED and UNCHANGED carry the lease; WAIT and REFUSED say
        when to ask again; with UNMANAGED the replica uses what Ray gave it."""
        answer = self._controller.lease_gpus(holder, generation, node_id, shape, tier)
        self._save()
        self._wake()
        return answer

    async def restore_lease(
        self, holder: str, generation: int, node_id: str, parts: tuple[GpuPart, ...]
    ) -> LeaseResponse:
        """What a running holder says that it has. REFUSED: it is somebody else's, and the holder will be
        told to retire."""
        answer = self._controller.restore_lease(holder, generation, node_id, parts)
        self._save()
        self._wake()
        return answer

    async def release_lease(self, holder: str, generation: int | None = None) -> LeaseResponse:
        """Give back what the holder has; deregistering does so too."""
        answer = self._controller.release_lease(holder, generation)
        self._save()
        self._wake()
        return answer

    async def may_start(self, holder: str, tier: str) -> StartPermission:
        """Whether an engine of the tier may be started now: not while the tier is held."""
        return self._controller.may_start(holder, tier)

    # --- scaling --------------------------------------------------------------------------------------------

    async def targets(self) -> Mapping[str, TierTarget]:
        """Tier → replicas to keep, and until when that holds. Raises NotSettled just after a restart: the
        last answer holds on."""
        return self._controller.targets()

    async def scaling(self) -> ScalingReport:
        """Targets with their reasons, advice, and how good it has been."""
        return self._scaling.report()

    async def scale(
        self, tier: str, replicas: int | None, for_s: float | None = None, reason: str = ""
    ) -> ActionResponse:
        """See :meth:`Scaling.scale`."""
        answer = self._done(self._scaling.scale(tier, replicas, for_s, reason))
        self._hurry.set()
        return answer

    # --- operators ------------------------------------------------------------------------------------------

    async def cordon(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.cordon`."""
        return self._done(self._operations.cordon(subject, reason))

    async def uncordon(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.uncordon`."""
        return self._done(self._operations.uncordon(subject, reason))

    async def drain(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.drain`."""
        return self._done(self._operations.drain(subject, reason))

    async def restart(self, subject: str, reason: str = "") -> ActionResponse:
        """See :meth:`OperatorActions.restart`."""
        return self._done(self._operations.restart(subject, reason))

    async def acknowledge_alert(self, rule: str, subject: str, by: str) -> ActionResponse:
        """See :meth:`Alerting.acknowledge`."""
        return self._done(self._alerts.alerting.acknowledge(rule, subject, by))

    async def silence_alerts(
        self, rule: str, subject: str, for_s: float, reason: str, by: str
    ) -> ActionResponse:
        """See :meth:`Alerting.silence`."""
        return self._done(self._alerts.alerting.silence(rule, subject, for_s, reason, by))

    async def unsilence_alerts(self, number: int, by: str) -> ActionResponse:
        """See :meth:`Alerting.unsilence`."""
        return self._done(self._alerts.alerting.unsilence(number, by))

    # --- for people -----------------------------------------------------------------------------------------

    async def status(self) -> tuple[ClusterSnapshot, tuple[TierSpec, ...], tuple[Event, ...]]:
        """Without secrets: endpoints and gateways, what the configuration asks for, events."""
        registry = self._controller.registry
        return registry.snapshot(secrets=False), registry.tiers, registry.events

    async def gpus(self) -> tuple[GpuView, ...]:
        """Every GPU with its health, holders and last readings."""
        return self._controller.gpus()

    async def alerts(self) -> AlertsResponse:
        """What fires or is pending, silences, and how deliveries go."""
        return self._alerts.answer()

    async def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """The audit log after entry number ``after``, oldest first; numbers survive restarts. A negative
        ``after``: the last ``limit`` entries."""
        return await asyncio.to_thread(self._recorder.events, after, limit)

    async def history(
        self, series: tuple[str, ...], since_unix_s: float, until_unix_s: float
    ) -> Mapping[str, list[Point]]:
        """Stored points of the series that :func:`controlplane.controller.reports.series_of` names."""
        store = self._recorder.store
        return {
            name: await asyncio.to_thread(store.history, name, since_unix_s, until_unix_s) for name in series
        }

    async def plane_report(self, window_minutes: float = 60.0) -> PlaneReport:
        """See :meth:`Reports.report`."""
        return await self._reports.report(window_minutes)

    async def activity(self) -> Activity:
        """What is under way."""
        return replace(self._controller.activity(), store_warning=self._recorder.warning, tick_s=self._tick_s)

    # --- loops ----------------------------------------------------------------------------------------------

    async def _look_loop(self) -> None:
        """Which nodes there are, and what their agents say."""
        while True:
            began_s = time.monotonic()
            try:
                alive = await self._watch.look()
                if alive is not None:
                    self._ray_gpus = alive
                    if self._cluster is None:
                        self._remember(set(alive))
                    self._controller.observe_nodes(alive.keys())
                    self._wake()
            except Exception as error:
                log.exception("could not look at the nodes", error=repr(error))
            await asyncio.sleep(_left_s(began_s, self._config.tick_interval_s))

    async def _tick_loop(self) -> None:
        while True:
            began_s = time.monotonic()
            try:
                self._controller.tick()
                self._tick_s = time.monotonic() - began_s
                self._wake()
                self._save()
                self._reports.tick()
            except Exception as error:
                log.exception("a tick failed; the next one looks again", error=repr(error))
            if self._controller.registry.empty_for_s() > IDLE_EXIT_S:
                await self._end()
            await asyncio.sleep(_left_s(began_s, self._config.tick_interval_s))

    async def _scrape_loop(self) -> None:
        """What the engines say of themselves."""
        async with EngineScraper() as scraper:
            while True:
                began_s, worked_s = time.monotonic(), time.thread_time()
                try:
                    endpoints = self._controller.registry.endpoints.values()
                    for sample in await scraper.scrape_all(scrape_targets(endpoints)):
                        self._controller.observe_engine(sample)
                except Exception as error:
                    log.exception("could not read the engines' metrics", error=repr(error))
                # Reading a page takes milliseconds: with very many engines it is done less often.
                pause_s = SCRAPE_PAUSE * (time.thread_time() - worked_s)
                await asyncio.sleep(max(pause_s, _left_s(began_s, self._config.engine_interval_s)))

    async def _scaling_loop(self) -> None:
        """Targets and advice, every few seconds and when somebody asks for a tier that sleeps."""
        while True:
            began_s = time.monotonic()
            self._hurry.clear()
            try:
                self._scaling.tick()
                self._wake()
                self._save()
            except Exception as error:
                log.exception("scaling failed; the next tick looks again", error=repr(error))
            with contextlib.suppress(TimeoutError):
                left_s = _left_s(began_s, self._scaling.config.tick_s)
                await asyncio.wait_for(self._hurry.wait(), left_s)

    async def _cordon_loop(self) -> None:
        while True:
            await self._hold_gpus()
            await asyncio.sleep(self._config.tick_interval_s)

    async def _hold_gpus(self) -> None:
        """Have Ray's own accounting know what is out of use."""
        wanted = self._controller.fleet.out_of_use()
        now_s = time.monotonic()
        if not self._ray_gpus or (wanted == self._held and now_s - self._held_s < CORDONS_INTERVAL_S):
            return
        if not wanted and self._held == {}:
            return
        try:
            await asyncio.to_thread(hold_gpus, self._config.namespace, wanted, dict(self._ray_gpus))
            self._held, self._held_s = wanted, now_s
        except (RayError, RuntimeError, OSError) as error:
            log.warning("cordons are not in Ray yet", error=str(error))

    async def _end(self) -> None:
        log.info("nobody is left, ending")
        await self._alerts.close()
        await asyncio.to_thread(let_go_of_all, self._config.namespace)
        await asyncio.to_thread(stop_node_agents, self._config.namespace)
        await asyncio.to_thread(self._recorder.close)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    # --- what is written down -------------------------------------------------------------------------------

    def _remember(self, cluster: set[str]) -> None:
        """Takes up what was stored, as far as it is about the cluster that is there."""
        self._cluster = cluster
        before = self._recorder.state.get(_CLUSTER) or ()
        if cluster & set(before):
            controller = self._controller
            stored = StoredState(self._recorder.state)
            checkpoint.restore_plane(
                *(stored, controller.fleet, controller.desk.table, controller.work),
                now_s=time.monotonic(),
                shift_s=self._shift_s,
            )
            self._scaling.restore(stored)
            self._alerts.restore(stored)
            _warn_of_damage(stored)
            controller.settle()
            controller.registry.note("remembers", "controller", "leases, cordons and moves from before")

    def _save(self) -> None:
        if self._cluster is None:
            return
        now_s = time.monotonic()
        noted, saved_s = self._saved
        if (
            noted == self._noted
            and not self._controller.registry.has_fresh
            and now_s - saved_s < SAVE_INTERVAL_S
        ):
            return
        controller = self._controller
        values = self._keeper.values(controller.fleet, controller.desk.table, controller.work)
        values |= self._scaling.values()
        values[_CLUSTER] = sorted(self._ray_gpus)
        values[_HEARD] = {node: list(last) for node, last in self._watch.heard.items()}
        values |= self._alerts.kept()
        self._recorder.save(values)
        self._saved = (self._noted, now_s)

    def _done(self, answer: ActionResponse) -> ActionResponse:
        self._record()
        return answer

    def _record(self) -> None:
        self._save()
        self._wake()

    def _wake(self) -> None:
        registry = self._controller.registry
        events = registry.take_events()
        for event in events:
            log.info(event.kind, **{key: value for key, value in asdict(event).items() if key in _LOGGED})
        self._noted += len(events)
        self._recorder.write_down(events)
        if registry.version != self._version:
            self._version = registry.version
            self._change.set()
            self._change = asyncio.Event()


_CLUSTER, _HEARD = "cluster", "heard"
"""Keys of what is stored besides :mod:`controlplane.controller.checkpoint`: ids of Ray's nodes, last events
heard."""
_LOGGED = ("subject", "tier", "reason", "actor")


def _warn_of_damage(stored: StoredState) -> None:
    if stored.damaged:
        log.warning("entries of the store can't be read and are dropped", entries=stored.damaged)


def store_path(config: ControllerConfig) -> Path | None:
    """The store's file; None: in memory only."""
    if config.store_path == IN_MEMORY:
        return None
    if config.store_path:
        return Path(config.store_path).expanduser()
    return run_dir() / f"controller-{config.namespace}.sqlite"


def control_rules(config: ControllerConfig) -> ControllerRules:
    """The rules as the configuration has them."""
    return ControllerRules(
        GpuRules(hot_for_s=config.overheat_after_s, hold_initial_s=config.cordon_hold_s),
        ReconcileRules(crash_limit=config.crash_limit),
        StallRules(after_s=config.hang_after_s),
    )


def scrape_targets(endpoints: Iterable[Endpoint]) -> list[ScrapeTarget]:
    """Where the engines that serve have their metrics."""
    return [
        ScrapeTarget(
            endpoint.endpoint_id,
            endpoint.generation,
            endpoint.base_url + endpoint.metrics_path,
            dict(endpoint.metric_names),
            endpoint.secret,
        )
        for endpoint in endpoints
        if endpoint.state is EndpointState.READY and endpoint.metrics_path and endpoint.metric_names
    ]


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
        # A call that was lost with the process is made again by whoever made it, knowing that it was.
        max_task_retries=0,
        # Each gateway holds one call open.
        max_concurrency=10_000,
    ).remote(config)
    return ControllerHandle(handle)


def _made_again() -> bool:
    """Whether Ray has restarted this actor after its process died."""
    with warnings.catch_warnings():
        # it is announced as deprecated, with nothing in its place
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _left_s(began_s: float, interval_s: float) -> float:
    return max(0.0, began_s + interval_s - time.monotonic())
