"""A tier as a Serve deployment: each replica supervises one engine process and reports it to the controller.

Serve puts replicas on nodes, counts them and replaces lost ones. No request goes through a replica: the
gateway connects to the engine's own port.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
import structlog
from ray import serve

from controlplane import logs
from controlplane.config import PlaneConfig, TierConfig
from controlplane.controller.api import ControllerApi
from controlplane.controller.client import ControllerLink, EndpointReporter
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.reconcile.commands import ReplicaCommand, ReplicaCommandKind
from controlplane.engines import engine_for
from controlplane.engines.cores import cores_for, usable_cores
from controlplane.engines.supervision.status import EngineStatus
from controlplane.engines.supervision.supervisor import EngineSupervisor
from controlplane.errors import ControllerUnavailable, EngineError
from controlplane.paths import run_dir
from controlplane.planning.gpu_shares import lease_shape
from controlplane.planning.launch_check import launchable_model
from controlplane.ray_cluster import session
from controlplane.ray_cluster.actor_options import actor_options, cluster_accelerator_types
from deployments.autoscaling_policy import autoscaling
from deployments.background import BackgroundTasks
from deployments.gpu_lease import EngineGpus, GpuLeaseClient

LOOPBACK = "127.0.0.1"
ENGINE_STOP_S = 30.0
"""How long a replica may take to stop its engine, in addition to the drain."""
GATEWAYS_SILENT_S = 5.0
"""How long a draining replica waits until all gateways have reported their requests in flight. Then only the
engine's own count is used."""
CONSTRUCTOR_TRIES = 2
"""Few, because the supervisor restarts engines; if it gives up, a new replica would not help."""

log = structlog.stdlib.get_logger(__name__)


class TierReplica:
    """One replica of a tier: ready when its engine is, healthy until its supervisor gives up."""

    _supervisor: EngineSupervisor | None = None
    _ending: asyncio.Task[None] | None = None
    _retiring: asyncio.Task[None] | None = None
    _restarted = 0
    """The last generation that the controller has commanded to replace."""

    async def __init__(self, config: PlaneConfig, tier: TierConfig) -> None:  # type: ignore[misc]
        self._tier = tier
        self._config = config
        self._leases_gpus = tier.gpus > 0 and not any(each.pipeline_across_nodes for each in config.tiers)
        self._loop = asyncio.get_running_loop()
        unique_id = serve.get_replica_context().replica_id.unique_id
        runtime = ray.get_runtime_context()
        logs.setup(
            config.controller.log_format,
            config.controller.log_level,
            file=run_dir() / "logs" / f"{tier.name}-{unique_id}-replica.log",
            component="tier",
            tier=tier.name,
            replica=unique_id,
        )
        # Ray sets this to the number of CPUs that it reserved, often 0, for libraries in its own workers.
        os.environ.pop("OMP_NUM_THREADS", None)
        if tier.pipeline_across_nodes:
            _prepare_for_ray_workers(runtime.gcs_address)
        self._base = Endpoint(
            endpoint_id=f"{tier.name}-{unique_id}",
            tier=tier.name,
            model=tier.model if tier.engine == "endpoint" else tier.model_id,
            engine=tier.engine,
            model_identity=tier.model_identity,
            base_url="",
            state=EndpointState.STARTING,
            concurrency_limit=tier.concurrency_limit,
            capabilities=engine_for(tier).capabilities(tier),
            metrics_path=engine_for(tier).metrics_path,
            metric_names=_metric_names(tier),
            node_id=runtime.get_node_id(),
            actor_id=runtime.get_actor_id() or "",
            since_unix_s=time.time(),
        )
        self._link = ControllerLink(config.controller)
        self._reporter = EndpointReporter(
            self._link, self._base, config.controller.heartbeat_s, on_commands=self._carry_out
        )
        self._tasks = BackgroundTasks(self._reporter.run())
        self._lease_client = GpuLeaseClient(
            self._link,
            holder=self._base.endpoint_id,
            tier=tier.name,
            node_id=self._base.node_id,
            show_wait=lambda text: self._reporter.update(replace(self._base, phase=text)),
            log=log,
        )
        try:
            await self._start(_engine_host(config), unique_id)
        except EngineError as error:
            if self._ending is not None:  # Serve stopped this replica before its engine was ready.
                await self._end()
                raise
            # This process is about to exit; the controller shows the failed endpoint with its diagnosis.
            supervisor, self._supervisor = self._supervisor, None
            if supervisor is None:
                state = EndpointState.FAILED
                self._reporter.update(replace(self._base, state=state, diagnosis=str(error)))
            await self._reporter.flush()
            await self._tasks.cancel()
            if supervisor is not None:
                await asyncio.to_thread(supervisor.stop)
            await self._lease_client.release()
            raise

    async def _start(self, host: str, unique_id: str) -> None:
        """Lease GPUs, start the engine on them, and wait until it is ready. Raises EngineError."""
        tier = self._tier
        await self._lease_client.may_start()
        gpus = EngineGpus()
        if tier.gpus and not self._leases_gpus:
            # Workers that vLLM starts on several nodes use the GPUs that Ray assigns, so all others must too.
            gpus = EngineGpus(_assigned_gpu_ids())
        elif tier.gpus:
            shape = await asyncio.to_thread(lease_shape, tier)
            gpus = await self._lease_client.lease(shape, _assigned_gpu_ids())
            if gpus.lease is not None:
                self._base = replace(self._base, gpu_uuids=gpus.lease.gpu_uuids)
                self._reporter.hold(gpus.lease)
        supervisor = EngineSupervisor(
            tier,
            replica_id=unique_id,
            host=host,
            gpu_ids=gpus.ids,
            cores=await asyncio.to_thread(_cores, tier, self._config),
            resolve_model=partial(launchable_model, tier, gpus.ids),
            on_change=lambda status: self._reporter.update(_endpoint(self._base, status)),
            log=log,
        )
        self._supervisor = supervisor
        supervisor.start()
        await asyncio.to_thread(supervisor.wait_ready, _start_limit_s(tier))

    async def check_health(self) -> None:
        """Raise if the supervisor has given up, so that Serve replaces this replica."""
        self._tasks.check()
        supervisor = self._supervisor
        if supervisor is not None and supervisor.status.state == EndpointState.FAILED:
            raise RuntimeError(f"the engine was given up: {supervisor.status.diagnosis}")

    def _carry_out(self, commands: tuple[ReplicaCommand, ...]) -> None:
        """Carry out the controller's commands. Each is repeated until the controller sees its effect."""
        for command in commands:
            supervisor = self._supervisor
            if supervisor is None:
                continue
            match command.kind:
                case ReplicaCommandKind.RETIRE if self._retiring is None:
                    log.info("retiring", reason=command.reason)
                    self._retiring = asyncio.create_task(self._retire())
                case ReplicaCommandKind.RESTART if self._restarted != command.generation:
                    self._restarted = command.generation
                    if supervisor.status.generation <= command.generation:
                        supervisor.restart(command.reason)

    async def _retire(self) -> None:
        """Drains, stops the engine, then this process. Serve replaces the replica if its target requires one.

        Serve notices at its next health check that an actor is gone. An actor that only reports itself
        unhealthy would hold its GPUs for three more checks.
        """
        await self._end()
        log.info("the replica ends")
        os.kill(os.getpid(), signal.SIGTERM)

    async def __del__(self) -> None:  # Serve awaits it before it ends the actor.
        await self._end()

    async def _end(self) -> None:
        """Drains and stops the engine, once; a second call waits for the first."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_engine())
        await asyncio.shield(self._ending)

    async def _end_engine(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        serving = supervisor.status.state in {EndpointState.READY, EndpointState.RESTARTING}
        if serving:
            self._draining_since_s = time.monotonic()
            idle = await asyncio.to_thread(supervisor.drain, self._tier.drain_timeout_s, self._still_running)
            reason = "drained" if idle else "stopped with requests still running"
        else:
            await asyncio.to_thread(supervisor.stop)
            reason = "stopped before it served"
        await self._tasks.cancel()
        await self._link.notify(ControllerApi.deregister, self._base.endpoint_id, reason)
        log.info("the replica has stopped", reason=reason)

    def _still_running(self) -> int:
        """Requests that gateways have in flight here; called in the supervisor's thread. While the number is
        unknown, it counts as 1, after :data:`GATEWAYS_SILENT_S` as 0."""
        query = self._link.call_within(2.0, ControllerApi.still_running, self._base.endpoint_id)
        try:
            count = asyncio.run_coroutine_threadsafe(query, self._loop).result()
        except ControllerUnavailable:
            count = None
        if count is None:
            return 1 if time.monotonic() - self._draining_since_s < GATEWAYS_SILENT_S else 0
        return count


def tier_application(config: PlaneConfig, tier: TierConfig) -> serve.Application:
    """The deployment of one tier.

    Tensor and pipeline parallel workers are the engine's own processes, and the replica reserves the GPUs for
    all of them. The GPUs of one actor are always on one node. With ``pipeline_across_nodes`` the engine's
    workers are Ray actors and reserve their GPUs themselves.
    """
    deployment = serve.deployment(
        name=tier.name,
        autoscaling_config=autoscaling(tier, config.controller.namespace),
        ray_actor_options=actor_options(
            tier, cluster_accelerator_types() if tier.pipeline_across_nodes else ()
        ),
        max_surge_percent=_surge_percent(tier),
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=tier.drain_timeout_s + ENGINE_STOP_S,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
    )(TierReplica)
    application: serve.Application = deployment.bind(config, tier)
    return application


def _surge_percent(tier: TierConfig) -> int:
    """``rollout_surge`` in Serve's terms: a percentage of the replicas, which Serve rounds up."""
    if not tier.rollout_surge:
        return 0
    return min(100, max(1, 100 * tier.rollout_surge // max(1, tier.replicas)))


def _endpoint(base: Endpoint, status: EngineStatus) -> Endpoint:
    return replace(
        base,
        base_url=status.base_url,
        state=status.state,
        secret=status.secret,
        generation=status.generation,
        phase=status.phase,
        pid=status.pid,
        started_unix_s=status.started_unix_s,
        since_unix_s=status.since_unix_s,
        restarts=status.restarts,
        diagnosis=status.diagnosis,
    )


def _metric_names(tier: TierConfig) -> tuple[tuple[str, str], ...]:
    """The metrics that the controller reads: pairs of a signal and the engine's own name for it."""
    names = asdict(engine_for(tier).metric_names)
    return tuple((signal, name) for signal, name in names.items() if name)


def _engine_host(config: PlaneConfig) -> str:
    """The address on which engines listen. Every gateway can reach it, and as few other hosts as possible."""
    if config.engine_host == "loopback" or (
        config.engine_host == "auto" and session.started_by_up(os.environ)
    ):
        return LOOPBACK
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _assigned_gpu_ids() -> tuple[str, ...]:
    """The GPUs that Ray assigned to this replica, as values for ``CUDA_VISIBLE_DEVICES``."""
    assigned: dict[str, Any] = ray.get_runtime_context().get_accelerator_ids()
    return tuple(str(each) for each in assigned.get("GPU", ()))


def _cores(tier: TierConfig, config: PlaneConfig) -> int:
    """The CPU cores of one engine of the tier on this machine, among the cluster's nodes that have CPUs."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    with_cpus = [node for node in nodes if node.get("Alive") and node.get("Resources", {}).get("CPU")]
    return cores_for(tier, config, machine_cores=usable_cores(), nodes=max(1, len(with_cpus)))


def _prepare_for_ray_workers(address: str) -> None:
    """Set up the environment of an engine that starts Ray actors: the address of its cluster, and access to
    all GPUs of this node, which Ray hides from an actor that has reserved none."""
    os.environ["RAY_ADDRESS"] = address
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def _start_limit_s(tier: TierConfig) -> float:
    """Upper limit of the time for all starts that the supervisor may try; it gives up earlier."""
    if not engine_for(tier).has_process:
        return tier.startup_timeout_s
    return (tier.restart.max_restarts + 1) * (tier.startup_timeout_s + tier.restart.backoff_max_s)
