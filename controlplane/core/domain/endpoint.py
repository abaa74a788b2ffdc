"""Endpoints: an engine process as the controller and the gateways know it, and the states it goes through.

``*_unix_s`` is wall-clock time in seconds since the epoch, comparable between machines; ``now_s`` anywhere in
the core is monotonic and comes from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from controlplane.errors import IllegalTransition


class EndpointState(StrEnum):
    """Where an endpoint is in its life; the legal transitions are in :data:`TRANSITIONS`."""

    STARTING = "starting"
    """The engine process starts and does not answer yet."""
    READY = "ready"
    """Answers requests."""
    RESTARTING = "restarting"
    """The engine was lost; its supervisor is bringing it back."""
    DRAINING = "draining"
    """Finishes what it runs, takes nothing new."""
    FAILED = "failed"
    """The supervisor gave up; ``diagnosis`` says why."""
    STOPPED = "stopped"
    """Gone on purpose."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond plain chat and completions."""

    resume_by_token_ids: bool = False
    """Gives token ids on request and continues a completion from token ids."""
    embeddings: bool = False
    responses: bool = False
    """Serves ``/v1/responses``."""
    messages: bool = False
    """Serves ``/v1/messages``."""
    tensor_parallel: bool = False
    simulated: bool = False
    """Its answers come from a timing model, not from a language model."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine process, as the controller knows it and gateways use it."""

    endpoint_id: str
    """Stable for the life of the replica; a new engine process of the replica keeps it."""
    tier: str
    model: str
    """The name the engine itself answers to in a request's ``model`` field."""
    engine: str
    base_url: str
    """Scheme, host and port, with an optional path in front of ``/v1``; no trailing slash. Empty until
    the engine has a port."""
    state: EndpointState
    concurrency_limit: int
    secret: str = field(default="", repr=False)
    """Sent as a bearer token. Never logged."""
    generation: int = 0
    """Counts engine processes of this replica, from 1; in-flight requests belong to one generation."""
    phase: str = ""
    """What the engine is doing while it is not ready, for people."""
    capabilities: Capabilities = Capabilities()
    node_id: str = ""
    actor_id: str = ""
    pid: int | None = None
    gpu_uuids: tuple[str, ...] = ()
    started_unix_s: float = 0.0
    """When this generation's process was started."""
    since_unix_s: float = 0.0
    """When ``state`` was entered."""
    restarts: int = 0
    diagnosis: str = ""
    metrics_path: str = ""
    """Where below ``base_url`` the engine has its metrics (Prometheus text); empty: nowhere."""
    metric_names: tuple[tuple[str, str], ...] = ()
    """Signal and the engine's own name for it; see ``controlplane.engines.base.MetricNames``."""


_S = EndpointState

TRANSITIONS: Mapping[EndpointState, frozenset[EndpointState]] = MappingProxyType(
    {
        _S.STARTING: frozenset({_S.READY, _S.RESTARTING, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.READY: frozenset({_S.RESTARTING, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.RESTARTING: frozenset({_S.READY, _S.DRAINING, _S.FAILED, _S.STOPPED}),
        _S.DRAINING: frozenset({_S.STOPPED}),
        _S.FAILED: frozenset({_S.RESTARTING, _S.READY, _S.DRAINING, _S.STOPPED}),
        _S.STOPPED: frozenset(),
    }
)
"""From each state, where an endpoint may go. Staying is no move and always allowed."""

SERVING = frozenset({_S.READY})
"""States in which an endpoint takes new requests."""

ENDED = frozenset({_S.FAILED, _S.STOPPED})
"""States that an endpoint does not come back from by itself; a failed one can be revived by hand."""


def check_transition(current: EndpointState, new: EndpointState) -> None:
    """Raise IllegalTransition unless an endpoint in ``current`` may be found in ``new``."""
    if new != current and new not in TRANSITIONS[current]:
        raise IllegalTransition(f"an endpoint that is {current} can't become {new}")


def transition(
    endpoint: Endpoint,
    state: EndpointState,
    *,
    unix_s: float,
    phase: str | None = None,
    diagnosis: str | None = None,
) -> Endpoint:
    """The endpoint in ``state``, entered at ``unix_s``; staying keeps the time it was entered.

    ``phase`` and ``diagnosis`` are kept where they are None. Raises IllegalTransition.
    """
    check_transition(endpoint.state, state)
    return replace(
        endpoint,
        state=state,
        since_unix_s=endpoint.since_unix_s if state == endpoint.state else unix_s,
        phase=endpoint.phase if phase is None else phase,
        diagnosis=endpoint.diagnosis if diagnosis is None else diagnosis,
    )
