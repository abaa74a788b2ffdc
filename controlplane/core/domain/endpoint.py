"""An endpoint (one engine process, as the controller and the gateways see it) and its states.

``*_unix_s`` is wall-clock time in seconds since the epoch, comparable between machines; ``now_s`` anywhere in
the core is monotonic and comes from the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from controlplane.errors import IllegalTransition


class EndpointState(StrEnum):
    """An endpoint's state; the legal transitions are in :data:`TRANSITIONS`."""

    STARTING = "starting"
    """The engine process starts and doesn't answer requests yet."""
    READY = "ready"
    """Answers requests."""
    RESTARTING = "restarting"
    """The engine process was lost; its supervisor starts another one."""
    DRAINING = "draining"
    """Finishes its running requests and takes no new ones."""
    FAILED = "failed"
    """The supervisor gave up; ``diagnosis`` says why."""
    STOPPED = "stopped"
    """Ended on purpose."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond plain chat and completions."""

    resume_by_token_ids: bool = False
    """Returns token ids if asked to, and continues a completion from token ids."""
    embeddings: bool = False
    responses: bool = False
    """Serves ``/v1/responses``."""
    messages: bool = False
    """Serves ``/v1/messages``."""
    images: bool = True
    """Takes images. This and the next three are true also where it is not known: then the engine decides."""
    audio: bool = True
    video: bool = True
    tools: bool = True
    tensor_parallel: bool = False
    simulated: bool = False
    """Its output comes from a timing model, not from a language model."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine process, as the controller and the gateways see it."""

    endpoint_id: str
    """Fixed for the life of the replica; restarting its engine process does not change it."""
    tier: str
    model: str
    """The name that the engine itself expects in a request's ``model`` field."""
    engine: str
    base_url: str
    """Scheme, host and port, optionally a path before ``/v1``; no trailing slash. Empty until the engine has
    a port."""
    state: EndpointState
    concurrency_limit: int
    secret: str = field(default="", repr=False)
    """Sent as a bearer token. Never logged."""
    generation: int = 0
    """Counts engine processes of this replica, from 1; in-flight requests belong to one generation."""
    phase: str = ""
    """What the engine is doing while it is not ready, for display."""
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
    model_identity: str = ""
    """Equal for endpoints that serve the same model; empty if it is not known."""
    metrics_path: str = ""
    """Path of the engine's metrics (Prometheus text) below ``base_url``; empty if it has none."""
    metric_names: tuple[tuple[str, str], ...] = ()
    """Pairs of a signal and the engine's own name for its metric; see
    ``controlplane.engines.base.MetricNames``."""


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
"""From each state, the states in which an endpoint may be found next. Staying is always allowed."""

SERVING = frozenset({_S.READY})
"""States in which an endpoint takes new requests."""

ENDED = frozenset({_S.FAILED, _S.STOPPED})
"""Final states, except that an operator can restart an endpoint that FAILED."""


def check_transition(current: EndpointState, new: EndpointState) -> None:
    """Raises IllegalTransition unless an endpoint in ``current`` may be found in ``new``."""
    if new is not current and new not in TRANSITIONS[current]:
        raise IllegalTransition(f"an endpoint that is {current} can't become {new}")
