"""The replicas of a tier under the virtual clock: they wait for room, start, serve, fail, drain and stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from controlplane.core.domain.endpoint import Capabilities, Endpoint, EndpointState
from controlplane.core.placement.gangs import WHOLE_MILLI, Gang, GangShape, Placement
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from controlplane.simulation.engine import EngineJob, EngineTiming, VirtualEngine
from controlplane.simulation.results import PlacementRecord


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Speed and limits of an engine on GPUs of one model."""

    timing: EngineTiming
    kv_tokens: float
    max_sequences: int
    """Maximum number of sequences that the engine runs at once."""


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """The replicas of a tier: engine, resources, cold start and failures."""

    engine: EngineModel
    concurrency_limit: int
    """Maximum number of requests that gateways send it at once."""
    gpus: float = 1.0
    cost_per_gpu_hour: float = 0.0
    cold_start_s: float = 60.0
    mtbf_s: float | None = None
    """Mean time between failures of a replica; None means that it never fails."""
    shape: GangShape | None = None
    """Resources on the cluster; None if it runs outside, or there are no nodes."""
    engines: Mapping[str, EngineModel] = field(default_factory=dict)
    """GPU model → its engine, for models on which it differs from ``engine``."""


class VirtualReplica:
    """One replica and its engine process."""

    __slots__ = ("endpoint", "engine", "gpu_model", "ordered_s", "placed_s", "ready_s", "stopped")

    def __init__(self, endpoint: Endpoint, ordered_s: float) -> None:
        self.endpoint = endpoint
        self.engine: VirtualEngine | None = None
        """None while the replica waits or starts."""
        self.ordered_s = ordered_s
        self.placed_s: float | None = None
        """When it got its resources; None while it waits for room."""
        self.gpu_model = ""
        self.ready_s = ordered_s
        self.stopped = False


class TierFleet:
    """All replicas of one tier."""

    def __init__(
        self,
        tier: str,
        model: ReplicaModel,
        clock: VirtualClock,
        cluster: Cluster,
        *,
        seed: int,
        on_first: Callable[[EngineJob], None],
        on_done: Callable[[EngineJob], None],
        on_lost: Callable[[EngineJob], None],
        on_change: Callable[[], None],
        in_flight: Callable[[str], int],
    ) -> None:
        self.tier = tier
        self.model = model
        self._clock = clock
        self._cluster = cluster
        self._rng = random.Random(f"fleet {tier} {seed}")
        self._on_first = on_first
        self._on_done = on_done
        self._on_lost = on_lost
        self._on_change = on_change
        self._in_flight = in_flight
        self._ordered = 0
        self.replicas: dict[str, VirtualReplica] = {}
        self.target = 0
        self._stopped_s = 0.0
        """Replica seconds of replicas that have stopped."""
        self.failures = 0
        self.starts = 0
        """Replicas that were placed."""
        self.placed = 0
        """Replicas that occupy resources: starting, ready or draining."""
        self._most_placed = 0
        self._waited, self._waited_s, self._longest_wait_s = 0, 0.0, 0.0
        """Number, total wait and longest wait of the replicas that no longer wait for room."""
        self._ordering = False
        """:meth:`scale_to` is ordering replicas, and reports the change when it is done."""

    def begin(self, replicas: int) -> None:
        """Order the first replicas of the run. If they fit, they are ready when the cluster opens."""
        self.target = replicas
        for _ in range(replicas):
            self._order()

    def scale_to(self, target: int) -> None:
        """Order replicas, or drain surplus ones: first those that wait for room, then starting ones, the
        youngest first, then those with the fewest requests."""
        self.target = target
        active = [r for r in self.replicas.values() if r.endpoint.state is not EndpointState.DRAINING]
        if target > len(active):
            self._ordering = True
            for _ in range(target - len(active)):
                self._order()
            self._ordering = False
            self._on_change()
        elif target < len(active):
            surplus = len(active) - target
            active.sort(key=self._drain_order)
            for replica in active[:surplus]:
                self._drain(replica)
            self._on_change()

    def stop_drained(self) -> None:
        """Stop draining replicas without requests. Call this when a request of a draining replica has
        ended."""
        drained = [
            replica
            for replica in self.replicas.values()
            if replica.endpoint.state is EndpointState.DRAINING
            and not self._in_flight(replica.endpoint.endpoint_id)
        ]
        for replica in drained:
            self._stop(replica)
        if drained:
            self._on_change()

    @property
    def ready(self) -> int:
        """Replicas that serve requests."""
        return sum(r.endpoint.state is EndpointState.READY for r in self.replicas.values())

    @property
    def waiting(self) -> int:
        """Replicas that wait for room."""
        return len(self.replicas) - self.placed

    def replica_hours(self) -> float:
        """Replica hours so far, each from its placement until it stops."""
        now_s = self._clock.now_s
        since = (replica.placed_s for replica in self.replicas.values())
        return (self._stopped_s + sum(now_s - at_s for at_s in since if at_s is not None)) / 3600

    def placement_record(self) -> PlacementRecord:
        """How long replicas waited for room, and how many GPUs they used, so far."""
        now_s = self._clock.now_s
        waits_s = [now_s - each.ordered_s for each in self.replicas.values() if each.placed_s is None]
        shape = self.model.shape
        gpus = self.model.gpus if shape is None else shape.total_milli / WHOLE_MILLI
        return PlacementRecord(
            waited=self._waited + len(waits_s),
            waited_s=self._waited_s + sum(waits_s),
            longest_wait_s=max([self._longest_wait_s, *waits_s]),
            waiting=self.waiting,
            most_gpus=self._most_placed * gpus,
        )

    def lose(self, replica_ids: Collection[str]) -> list[EngineJob]:
        """Stop those of the given replicas that belong to this tier, because their node failed. Returns the
        jobs of their engines. The caller reports the change, and replaces the replicas with
        :meth:`scale_to`."""
        lost: list[EngineJob] = []
        for replica in [each for name, each in self.replicas.items() if name in replica_ids]:
            self.failures += 1
            if replica.engine is not None:
                lost += replica.engine.kill()
            self._stop(replica)
        return lost

    def endpoints(self) -> list[Endpoint]:
        """The endpoints that the controller's snapshot would list."""
        return [replica.endpoint for replica in self.replicas.values() if replica.placed_s is not None]

    def engine(self, endpoint_id: str) -> VirtualEngine:
        """The engine of a ready replica. KeyError if it has none yet."""
        engine = self.replicas[endpoint_id].engine
        if engine is None:
            raise KeyError(f"{endpoint_id} has no engine yet")
        return engine

    def _drain_order(self, replica: VirtualReplica) -> tuple[Any, ...]:
        starting = replica.endpoint.state in (EndpointState.STARTING, EndpointState.RESTARTING)
        return (
            replica.placed_s is not None,
            not starting,
            -replica.ordered_s if starting else self._in_flight(replica.endpoint.endpoint_id),
            -replica.ordered_s,
        )

    def _order(self) -> None:
        self._ordered += 1
        endpoint = Endpoint(
            endpoint_id=f"{self.tier}-{self._ordered}",
            tier=self.tier,
            model=self.tier,
            engine="simulated",
            base_url="",
            state=EndpointState.STARTING,
            concurrency_limit=self.model.concurrency_limit,
            generation=1,
            capabilities=Capabilities(simulated=True),
        )
        replica = self.replicas[endpoint.endpoint_id] = VirtualReplica(endpoint, self._clock.now_s)
        shape = self.model.shape
        gang = None if shape is None else Gang(endpoint.endpoint_id, shape, self.tier)
        self._cluster.add(endpoint.endpoint_id, gang, partial(self._on_placed, replica))

    def _on_placed(self, replica: VirtualReplica, placement: Placement | None, ready: bool) -> None:
        """Start a replica that has got its resources; if ``ready``, it is ready at once."""
        now_s = self._clock.now_s
        self.starts += 1
        self.placed += 1
        self._most_placed = max(self._most_placed, self.placed)
        replica.placed_s = now_s
        replica.gpu_model = self._cluster.model_of(placement)
        if ready:
            self._become_ready(replica)
        else:
            self._clock.at(now_s + self.model.cold_start_s, self._started, replica)
        self._count_wait(now_s - replica.ordered_s)
        if not (ready or self._ordering):
            self._on_change()

    def _count_wait(self, waited_s: float) -> None:
        if waited_s > 0:
            self._waited += 1
            self._waited_s += waited_s
            self._longest_wait_s = max(self._longest_wait_s, waited_s)

    def _started(self, replica: VirtualReplica) -> None:
        if replica.stopped or replica.endpoint.state is EndpointState.DRAINING:
            return
        self._become_ready(replica)
        self._on_change()

    def _become_ready(self, replica: VirtualReplica) -> None:
        model = self.model
        engine = model.engines.get(replica.gpu_model, model.engine)
        replica.engine = VirtualEngine(
            self._clock,
            engine.timing,
            max_sequences=engine.max_sequences,
            kv_tokens=engine.kv_tokens,
            on_first=self._on_first,
            on_done=self._on_done,
        )
        replica.endpoint = replace(replica.endpoint, state=EndpointState.READY)
        replica.ready_s = self._clock.now_s
        if model.mtbf_s is not None:
            fails_s = self._clock.now_s + self._rng.expovariate(1.0 / model.mtbf_s)
            self._clock.at(fails_s, self._fail, (replica, replica.endpoint.generation))

    def _fail(self, argument: tuple[VirtualReplica, int]) -> None:
        replica, generation = argument
        engine = replica.engine
        if replica.stopped or engine is None or replica.endpoint.generation != generation:
            return
        self.failures += 1
        lost = engine.kill()
        replica.engine = None
        if replica.endpoint.state is EndpointState.DRAINING:
            self._stop(replica)
        else:
            replica.endpoint = replace(
                replica.endpoint, state=EndpointState.RESTARTING, generation=generation + 1
            )
            self._clock.at(self._clock.now_s + self.model.cold_start_s, self._started, replica)
        self._on_change()
        for job in lost:
            self._on_lost(job)

    def _drain(self, replica: VirtualReplica) -> None:
        if replica.endpoint.state is not EndpointState.READY or not self._in_flight(
            replica.endpoint.endpoint_id
        ):
            self._stop(replica)
        else:
            replica.endpoint = replace(replica.endpoint, state=EndpointState.DRAINING)

    def _stop(self, replica: VirtualReplica) -> None:
        replica.stopped = True
        now_s = self._clock.now_s
        if replica.placed_s is not None:
            self._stopped_s += now_s - replica.placed_s
            self.placed -= 1
        else:
            self._count_wait(now_s - replica.ordered_s)
        del self.replicas[replica.endpoint.endpoint_id]
        if self.model.shape is not None:
            self._cluster.remove(replica.endpoint.endpoint_id)
