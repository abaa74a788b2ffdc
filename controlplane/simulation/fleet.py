"""Replicas that start, serve, fail, drain and go, under the virtual clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from controlplane.core.domain import Capabilities, Endpoint, EndpointState
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.engine import Engine, Job, Timing


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    """What a replica of a tier is like."""

    timing: Timing
    kv_tokens: float
    max_sequences: int
    """What the engine itself runs at once."""
    concurrency_limit: int
    """What gateways send it at once."""
    gpus: float = 1.0
    cost_per_gpu_hour: float = 0.0
    cold_start_s: float = 60.0
    cold_start_jitter: float = 0.0
    """Each start takes a time within this share of ``cold_start_s`` around it."""
    mtbf_s: float | None = None
    """Mean time between failures of a replica; None: it never fails."""


class Replica:
    """One replica and its engine process."""

    __slots__ = ("endpoint", "engine", "ordered_s", "ready_s", "stopped")

    def __init__(self, endpoint: Endpoint, ordered_s: float) -> None:
        self.endpoint = endpoint
        self.engine: Engine | None = None
        """None while it starts."""
        self.ordered_s = ordered_s
        self.ready_s = ordered_s
        self.stopped = False


class TierFleet:
    """All replicas of one tier."""

    def __init__(
        self,
        tier: str,
        model: ReplicaModel,
        clock: VirtualClock,
        *,
        seed: int,
        on_first: Callable[[Job], None],
        on_done: Callable[[Job], None],
        on_lost: Callable[[Job], None],
        on_change: Callable[[], None],
        in_flight: Callable[[str], int],
    ) -> None:
        self.tier = tier
        self.model = model
        self._clock = clock
        self._rng = random.Random(f"fleet {tier} {seed}")
        self._on_first = on_first
        self._on_done = on_done
        self._on_lost = on_lost
        self._on_change = on_change
        self._in_flight = in_flight
        self._count = 0
        self.replicas: dict[str, Replica] = {}
        self.target = 0
        self._held_s = 0.0
        """Of replicas that are gone."""
        self.failures = 0
        self.starts = 0

    def begin(self, replicas: int) -> None:
        """What the run begins with: replicas that are ready."""
        self.target = replicas
        for _ in range(replicas):
            self._become_ready(self._order())
        self._on_change()

    def scale_to(self, target: int) -> None:
        """Orders replicas, or drains the ones that are easiest to lose: first those that still start, the
        youngest first, then the ones with the fewest requests."""
        self.target = target
        active = [r for r in self.replicas.values() if r.endpoint.state is not EndpointState.DRAINING]
        if target > len(active):
            for _ in range(target - len(active)):
                replica = self._order()
                self._clock.at(self._clock.now_s + self._cold_start_s(), self._started, replica)
            self._on_change()
        elif target < len(active):
            surplus = len(active) - target
            active.sort(key=self._loss)
            for replica in active[:surplus]:
                self._drain(replica)
            self._on_change()

    def settle(self) -> None:
        """Stops what has drained; to be called when a request ended."""
        gone = [
            replica
            for replica in self.replicas.values()
            if replica.endpoint.state is EndpointState.DRAINING
            and not self._in_flight(replica.endpoint.endpoint_id)
        ]
        for replica in gone:
            self._stop(replica)
        if gone:
            self._on_change()

    @property
    def ready(self) -> int:
        """Replicas that answer."""
        return sum(r.endpoint.state is EndpointState.READY for r in self.replicas.values())

    def replica_hours(self) -> float:
        """So far, from the order of a replica until it is gone."""
        now_s = self._clock.now_s
        return (self._held_s + sum(now_s - replica.ordered_s for replica in self.replicas.values())) / 3600

    def endpoints(self) -> list[Endpoint]:
        """As the controller's snapshot would list them."""
        return [replica.endpoint for replica in self.replicas.values()]

    def engine(self, endpoint_id: str) -> Engine:
        """The engine of a ready replica."""
        engine = self.replicas[endpoint_id].engine
        if engine is None:
            raise KeyError(f"{endpoint_id} has no engine yet")
        return engine

    def _loss(self, replica: Replica) -> tuple[Any, ...]:
        starting = replica.endpoint.state in (EndpointState.STARTING, EndpointState.RESTARTING)
        return (
            not starting,
            -replica.ordered_s if starting else self._in_flight(replica.endpoint.endpoint_id),
            -replica.ordered_s,
        )

    def _order(self) -> Replica:
        self._count += 1
        self.starts += 1
        endpoint = Endpoint(
            endpoint_id=f"{self.tier}-{self._count}",
            tier=self.tier,
            model=self.tier,
            engine="simulated",
            base_url="",
            state=EndpointState.STARTING,
            concurrency_limit=self.model.concurrency_limit,
            generation=1,
            capabilities=Capabilities(simulated=True),
        )
        replica = self.replicas[endpoint.endpoint_id] = Replica(endpoint, self._clock.now_s)
        return replica

    def _cold_start_s(self) -> float:
        jitter = self.model.cold_start_jitter
        return self.model.cold_start_s * (self._rng.uniform(1 - jitter, 1 + jitter) if jitter else 1.0)

    def _started(self, replica: Replica) -> None:
        if replica.stopped or replica.endpoint.state is EndpointState.DRAINING:
            return
        self._become_ready(replica)
        self._on_change()

    def _become_ready(self, replica: Replica) -> None:
        model = self.model
        replica.engine = Engine(
            self._clock,
            model.timing,
            max_sequences=model.max_sequences,
            kv_tokens=model.kv_tokens,
            on_first=self._on_first,
            on_done=self._on_done,
        )
        replica.endpoint = replace(replica.endpoint, state=EndpointState.READY)
        replica.ready_s = self._clock.now_s
        if model.mtbf_s is not None:
            fails_s = self._clock.now_s + self._rng.expovariate(1.0 / model.mtbf_s)
            self._clock.at(fails_s, self._fail, (replica, replica.endpoint.generation))

    def _fail(self, argument: tuple[Replica, int]) -> None:
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
            self._clock.at(self._clock.now_s + self._cold_start_s(), self._started, replica)
        self._on_change()
        for job in lost:
            self._on_lost(job)

    def _drain(self, replica: Replica) -> None:
        if replica.endpoint.state is not EndpointState.READY or not self._in_flight(
            replica.endpoint.endpoint_id
        ):
            self._stop(replica)
        else:
            replica.endpoint = replace(replica.endpoint, state=EndpointState.DRAINING)

    def _stop(self, replica: Replica) -> None:
        replica.stopped = True
        self._held_s += self._clock.now_s - replica.ordered_s
        del self.replicas[replica.endpoint.endpoint_id]
