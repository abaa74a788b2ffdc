"""The snapshot that the controller publishes, and how a gateway merges one into what it has.

A controller that has just started knows nothing until replicas and gateways register again. Its snapshots
say ``warming`` for that time, and a gateway keeps what it knew beside them, so that a controller's restart
is not felt on any request's path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlplane.core.alerts.views import FiringAlert
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.traffic.counters import TrafficCounters


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
    traffic: tuple[TrafficCounters, ...] = ()
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
    :func:`controlplane.core.cluster.snapshot.merge`."""
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


def is_newer(old: ClusterSnapshot, new: ClusterSnapshot) -> bool:
    """Whether ``new`` says something that ``old`` does not: another epoch, or a later version of the same."""
    return new.epoch != old.epoch or new.version > old.version


def merge(old: ClusterSnapshot | None, new: ClusterSnapshot) -> ClusterSnapshot:
    """What to go by after ``new`` arrived.

    * a snapshot that is not newer changes nothing;
    * while ``new`` is warming, endpoints that it does not name are kept from ``old``, except those that it
      knows to be gone, and so are alerts and the replicas due until it names some;
    * otherwise ``new`` is the truth.
    """
    if old is None:
        return new
    if not is_newer(old, new):
        return old
    if not new.warming:
        return new
    settled = {endpoint.endpoint_id for endpoint in new.endpoints} | set(new.gone)
    kept = tuple(endpoint for endpoint in old.endpoints if endpoint.endpoint_id not in settled)
    return replace(
        new,
        endpoints=new.endpoints + kept,
        alerts=new.alerts or old.alerts,
        due=new.due or old.due,
    )
