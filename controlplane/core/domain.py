"""The nouns: frozen values that the controller, the gateways and the deployments exchange.

``*_unix_s`` is wall-clock time in seconds since the epoch, comparable between machines;
``now_s`` anywhere in the core is monotonic and comes from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from controlplane.core.alert_views import FiringAlert
from controlplane.core.scaling_plan import ScalingPlan
from controlplane.core.traffic import Traffic


class EndpointState(StrEnum):
    """Where an endpoint is in its life; the legal moves are in :mod:`controlplane.core.health`."""

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


class Complexity(StrEnum):
    """How much model a request needs, as its caller or a scorer says."""

    SIMPLE = "simple"
    MODERATE = "moderate"
    COMPLEX = "complex"


class Priority(StrEnum):
    """Which requests go first when a tier is full."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


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


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """One gateway replica, as the controller knows it."""

    gateway_id: str
    node_id: str
    url: str
    """Its own port; empty if it only answers on Serve's ingress."""
    in_flight: int = 0
    queued: int = 0
    in_flight_by_endpoint: tuple[tuple[str, int], ...] = ()
    traffic: tuple[Traffic, ...] = ()
    """What it has counted, by tier and endpoint; for the controller only, not in snapshots."""
    snapshot: tuple[str, int] = ("", 0)
    """Epoch and version of the snapshot it goes by."""
    seen_unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TierScaling:
    """What gateways show of a tier's scaling."""

    tier: str
    target: int
    """Replicas that it is to have."""
    wanted: int
    """Replicas that the policy would have."""
    forecast_per_s: float
    """Requests a second that are expected when a replica ordered now is ready."""
    advice: str = ""
    """The kind of the recommendation that holds now; empty: none."""


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """What the controller knows at one moment. ``(epoch, version)`` orders snapshots: a new epoch is a
    new controller process, and inside an epoch the version only grows."""

    epoch: str
    version: int
    unix_s: float
    endpoints: tuple[Endpoint, ...] = ()
    gateways: tuple[GatewayInfo, ...] = ()
    warming: bool = False
    """The controller has just started and may not know every endpoint yet: see
    :func:`controlplane.core.snapshot.merge`."""
    gone: tuple[str, ...] = ()
    """While warming: endpoint ids that left since this epoch began."""
    scaling: tuple[TierScaling, ...] = ()
    alerts: tuple[FiringAlert, ...] = ()
    """What fires, the worst first."""
    due: tuple[tuple[str, int], ...] = ()
    """Tier → replicas that have to be there now: none while an operator has drained it."""

    def wanted(self, tier: str, configured: int) -> int:
        """Replicas that a tier is to have: as it is scaled, else as configured."""
        return next((item.target for item in self.scaling if item.tier == tier), configured)


@dataclass(frozen=True, slots=True)
class TierSpec:
    """What the configuration asks of a tier, as far as the controller needs it."""

    name: str
    model: str
    engine: str
    replicas: int
    concurrency_limit: int
    attainment: float | None = None
    """The share of its requests that must get what its SLO promises; None: not said."""
    scaling: ScalingPlan | None = None
    """None: it runs elsewhere, and no replicas of it are here."""

    @property
    def plan(self) -> ScalingPlan:
        """Its scaling. ValueError: it runs elsewhere."""
        if self.scaling is None:
            raise ValueError(f"nothing is known of the scaling of tier '{self.name}'")
        return self.scaling


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened or was done, and why."""

    number: int
    """Counts the events of one controller process."""
    unix_s: float
    kind: str
    subject: str
    """An endpoint id, a gateway id, a GPU's UUID, a node id, a tier, or ``controller``."""
    reason: str
    tier: str = ""
    actor: str = "controller"
    """Who did it: ``controller`` or ``operator``."""
