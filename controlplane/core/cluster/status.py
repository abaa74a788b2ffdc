"""What people are told of the tiers: the configuration's wishes beside what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState

WAITING = "waiting"
"""No replica of the tier has reported yet."""
DEGRADED = "degraded"
"""Some replicas serve, but fewer than the tier is to have."""
IDLE = "idle"
"""It is to have no replica: so configured, or it sleeps until somebody asks for it."""

_SHOWN_FIRST = (
    EndpointState.FAILED,
    EndpointState.RESTARTING,
    EndpointState.STARTING,
    EndpointState.DRAINING,
    EndpointState.STOPPED,
)


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint and what all gateways have in flight there."""

    endpoint: Endpoint
    in_flight: int


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier in a line: ``state`` is an endpoint state, or waiting, degraded, idle."""

    name: str
    model: str
    engine: str
    state: str
    replicas_ready: int
    replicas_wanted: int
    in_flight: int
    restarts: int
    phase: str
    """What the least advanced replica is doing; empty when all serve."""
    diagnosis: str
    endpoints: tuple[EndpointStatus, ...]

    @property
    def ready(self) -> bool:
        """Whether as many replicas serve as the tier is to have."""
        return self.replicas_ready >= self.replicas_wanted

    @property
    def failed(self) -> bool:
        """Whether a replica gave up and none serves in its place."""
        return self.state == EndpointState.FAILED


def tier_statuses(snapshot: ClusterSnapshot, specs: Sequence[TierSpec]) -> tuple[TierStatus, ...]:
    """Each configured tier in its order, then tiers that only endpoints know of."""
    in_flight: dict[str, int] = {}
    for gateway in snapshot.gateways:
        for endpoint_id, count in gateway.in_flight_by_endpoint:
            in_flight[endpoint_id] = in_flight.get(endpoint_id, 0) + count
    known = {spec.name for spec in specs}
    others = {
        endpoint.tier: TierSpec(endpoint.tier, endpoint.model, endpoint.engine, 0, endpoint.concurrency_limit)
        for endpoint in snapshot.endpoints
        if endpoint.tier not in known
    }
    return tuple(
        _tier_status(
            spec,
            snapshot.wanted(spec.name, spec.replicas),
            tuple(
                EndpointStatus(endpoint, in_flight.get(endpoint.endpoint_id, 0))
                for endpoint in snapshot.endpoints
                if endpoint.tier == spec.name
            ),
        )
        for spec in [*specs, *others.values()]
    )


def _tier_status(spec: TierSpec, wanted: int, endpoints: tuple[EndpointStatus, ...]) -> TierStatus:
    by_state = {item.endpoint.state: item.endpoint for item in reversed(endpoints)}
    ready = sum(item.endpoint.state == EndpointState.READY for item in endpoints)
    behind = next((by_state[state] for state in _SHOWN_FIRST if state in by_state), None)
    if ready >= wanted:
        state = EndpointState.READY.value if endpoints else IDLE
        behind = None
    elif ready:
        state = DEGRADED
    else:
        state = behind.state.value if behind else WAITING
    return TierStatus(
        name=spec.name,
        model=spec.model,
        engine=spec.engine,
        state=state,
        replicas_ready=ready,
        replicas_wanted=wanted,
        in_flight=sum(item.in_flight for item in endpoints),
        restarts=sum(item.endpoint.restarts for item in endpoints),
        phase=behind.phase if behind else "",
        diagnosis=behind.diagnosis if behind else "",
        endpoints=endpoints,
    )
