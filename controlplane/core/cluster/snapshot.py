"""The snapshot that the controller publishes, and how a gateway merges it with the one it has.

A controller that has just started knows nothing until replicas and gateways register again. Until then its
snapshots are marked ``warming``, and a gateway continues to use the endpoints it knew before, so that a
restart of the controller affects no request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from controlplane.core.alerts.views import FiringAlert
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.traffic.counters import TrafficCounters
from controlplane.core.traffic.request_log import RequestBatch


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """One gateway replica, as the controller knows it."""

    gateway_id: str
    node_id: str
    url: str
    """Address of its own port; empty if it is only reachable through Serve's ingress."""
    in_flight: int = 0
    queued: int = 0
    in_flight_by_endpoint: tuple[tuple[str, int], ...] = ()
    traffic: tuple[TrafficCounters, ...] = ()
    """Its counters by tier and endpoint. Only the controller reads them; snapshots don't have them."""
    snapshot: tuple[str, int] = ("", 0)
    """Epoch and version of the snapshot that it uses."""
    seen_unix_s: float = 0.0
    ended: RequestBatch | None = None
    """What it logs of requests that have ended. As ``traffic``, not in snapshots."""


@dataclass(frozen=True, slots=True)
class TierScaling:
    """The part of a tier's scaling that gateways export as metrics."""

    tier: str
    target: int
    """Target replicas, without migrations."""
    wanted: int
    """Replicas that the scaling policy recommends, whether or not the controller applies it."""
    forecast_per_s: float
    """Requests per second expected at the time when a replica ordered now would be ready."""
    recommendation: str = ""
    """The kind of the open recommendation; empty if there is none."""


class TierMode(StrEnum):
    """Why a tier has no replicas, or fewer than it should, although nothing is wrong with it."""

    DRAINED = "drained"
    """Its replicas leave and none is started, until an operator uncordons it."""
    HELD = "held"
    """No replica is started; those that run go on."""
    STARTING = "starting"
    """It has never served yet, and its replicas are starting."""
    AT_ZERO = "scaled to zero"
    """It has no replica until a request arrives or an operator sets a number."""


@dataclass(frozen=True, slots=True)
class TierNote:
    """The mode of a tier that is not simply on."""

    tier: str
    mode: TierMode
    reason: str
    since_unix_s: float


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """What the controller knows at one moment.

    ``(epoch, version)`` orders snapshots: each controller process has its own epoch, and within an epoch the
    version only increases.
    """

    epoch: str
    version: int
    unix_s: float
    endpoints: tuple[Endpoint, ...] = ()
    gateways: tuple[GatewayInfo, ...] = ()
    warming: bool = False
    """Whether the controller has just started and may not know every endpoint yet; see :func:`merge`."""
    gone: tuple[str, ...] = ()
    """While warming: ids of endpoints that left since this epoch began."""
    scaling: tuple[TierScaling, ...] = ()
    alerts: tuple[FiringAlert, ...] = ()
    """Firing alerts, the most severe first."""
    due: tuple[tuple[str, int], ...] = ()
    """Tier → replicas that it must have now; 0 while it is drained by an operator, or starts for the first
    time."""
    notes: tuple[TierNote, ...] = ()
    """Tiers that are drained, held, starting for the first time, or scaled to zero."""
    silent: tuple[tuple[str, float], ...] = ()
    """Endpoint id → wall clock of its last report, of those that have missed reports."""
    keys_version: str = ""
    """The version of the API keys; empty while the controller does not know them."""

    def note_of(self, tier: str) -> TierNote | None:
        """The tier's mode; None if it is simply on."""
        return next((note for note in self.notes if note.tier == tier), None)

    def target_replicas(self, tier: str, configured: int) -> int:
        """Target replicas of a tier; the ``configured`` number if it isn't scaled."""
        return next((item.target for item in self.scaling if item.tier == tier), configured)


def is_newer(old: ClusterSnapshot, new: ClusterSnapshot) -> bool:
    """Whether ``new`` is from another epoch than ``old``, or has a higher version."""
    return new.epoch != old.epoch or new.version > old.version


def merge(old: ClusterSnapshot | None, new: ClusterSnapshot) -> ClusterSnapshot:
    """The snapshot to use once ``new`` has arrived.

    * A snapshot that isn't newer changes nothing.
    * While ``new`` is warming, endpoints that it lacks are taken from ``old``, except those listed in its
      ``gone``. Alerts and due replicas are taken from ``old`` until ``new`` has some.
    * Otherwise ``new`` replaces ``old``.
    """
    if old is None:
        return new
    if not is_newer(old, new):
        return old
    if not new.warming:
        return new
    known = {endpoint.endpoint_id for endpoint in new.endpoints} | set(new.gone)
    from_old = tuple(endpoint for endpoint in old.endpoints if endpoint.endpoint_id not in known)
    return replace(
        new,
        endpoints=new.endpoints + from_old,
        alerts=new.alerts or old.alerts,
        due=new.due or old.due,
        notes=new.notes or old.notes,
    )
