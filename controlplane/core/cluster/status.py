"""The status of each tier for display: what is configured, and what runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.core.cluster.snapshot import ClusterSnapshot, TierMode, TierNote
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState

WAITING = "waiting"
"""No replica of the tier has reported yet."""
DRAINED = "drained"
"""An operator drained the tier, and its replicas have left."""
DEGRADED = "degraded"
"""Some replicas serve, but fewer than the target."""
IDLE = "idle"
"""The tier's target is 0: by configuration, or because it is scaled to zero until a request arrives."""

_LEAST_ADVANCED_FIRST = (
    EndpointState.FAILED,
    EndpointState.RESTARTING,
    EndpointState.STARTING,
    EndpointState.DRAINING,
    EndpointState.STOPPED,
)


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint, and its in-flight requests from all gateways."""

    endpoint: Endpoint
    in_flight: int
    reported_unix_s: float | None = None
    """Its last report, if it has missed some since; None while it reports."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier. ``state`` is an endpoint state, or :data:`WAITING`, :data:`DEGRADED`, :data:`DRAINED`,
    :data:`IDLE`."""

    name: str
    model: str
    engine: str
    state: str
    replicas_ready: int
    replicas_wanted: int
    """Target replicas."""
    in_flight: int
    restarts: int
    phase: str
    """What the least advanced replica is doing; empty if all serve."""
    diagnosis: str
    endpoints: tuple[EndpointStatus, ...]
    note: TierNote | None = None
    """Why it has no replicas, or fewer than it should, on purpose."""

    @property
    def ready(self) -> bool:
        """Whether at least the target number of replicas serve."""
        return self.replicas_ready >= self.replicas_wanted

    @property
    def failed(self) -> bool:
        """Whether a replica has failed and none serves."""
        return self.state == EndpointState.FAILED


def tier_statuses(snapshot: ClusterSnapshot, specs: Sequence[TierSpec]) -> tuple[TierStatus, ...]:
    """Each configured tier in the configuration's order, then tiers that have endpoints but no
    configuration."""
    in_flight: dict[str, int] = {}
    for gateway in snapshot.gateways:
        for endpoint_id, count in gateway.in_flight_by_endpoint:
            in_flight[endpoint_id] = in_flight.get(endpoint_id, 0) + count
    silent = dict(snapshot.silent)
    known = {spec.name for spec in specs}
    others = {
        endpoint.tier: TierSpec(
            name=endpoint.tier,
            model=endpoint.model,
            engine=endpoint.engine,
            replicas=0,
            concurrency_limit=endpoint.concurrency_limit,
        )
        for endpoint in snapshot.endpoints
        if endpoint.tier not in known
    }
    return tuple(
        _tier_status(
            spec,
            snapshot.target_replicas(spec.name, spec.replicas),
            snapshot.note_of(spec.name),
            tuple(
                EndpointStatus(
                    endpoint, in_flight.get(endpoint.endpoint_id, 0), silent.get(endpoint.endpoint_id)
                )
                for endpoint in snapshot.endpoints
                if endpoint.tier == spec.name
            ),
        )
        for spec in [*specs, *others.values()]
    )


def _tier_status(
    spec: TierSpec, target: int, note: TierNote | None, endpoints: tuple[EndpointStatus, ...]
) -> TierStatus:
    if note is not None and note.mode is TierMode.DRAINED:
        target = 0
    by_state = {item.endpoint.state: item.endpoint for item in reversed(endpoints)}
    ready = sum(item.endpoint.state == EndpointState.READY for item in endpoints)
    least = next((by_state[state] for state in _LEAST_ADVANCED_FIRST if state in by_state), None)
    if ready >= target:
        state = EndpointState.READY.value if endpoints else IDLE
        if note is not None and note.mode is TierMode.DRAINED:
            state = EndpointState.DRAINING.value if endpoints else DRAINED
        least = None
    elif ready:
        state = DEGRADED
    else:
        starting = note is not None and note.mode is TierMode.STARTING
        waiting = EndpointState.STARTING.value if starting else WAITING
        state = least.state.value if least else waiting
    return TierStatus(
        name=spec.name,
        model=spec.model,
        engine=spec.engine,
        state=state,
        replicas_ready=ready,
        replicas_wanted=target,
        in_flight=sum(item.in_flight for item in endpoints),
        restarts=sum(item.endpoint.restarts for item in endpoints),
        phase=least.phase if least else "",
        diagnosis=least.diagnosis if least else "",
        endpoints=endpoints,
        note=note,
    )
