"""The controller's remote interface: what replicas, gateways, the command line and Serve's autoscaler call.

The controller is a Ray actor (:class:`~controlplane.controller.actor.ControllerActor`); each method here is a
remote call. :mod:`controlplane.controller.handle` makes the calls, typed by this protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from controlplane.controller.keys import KeyRequest, KeyResponse
from controlplane.core.access.keys import KeyRecord, KeyTable
from controlplane.core.alerts.views import AlertsResponse
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint
from controlplane.core.domain.event import Event
from controlplane.core.gpus.leases import GpuPart, LeaseResponse
from controlplane.core.gpus.node_views import NodeView
from controlplane.core.gpus.views import GpuView
from controlplane.core.placement.gangs import GangShape
from controlplane.core.recommendations.views import ScalingReport
from controlplane.core.reconcile.commands import ActionResponse, ReportResponse, StartPermission
from controlplane.core.reconcile.migrations import Activity
from controlplane.core.reconcile.replica_targets import TierTarget
from controlplane.core.reports.recorded_traffic import Point
from controlplane.core.reports.report import PlaneReport
from controlplane.core.traffic.request_log import RequestsView, SessionOrder, SessionsView, UsageBy, UsageView

if TYPE_CHECKING:  # They take half a second to import, which commands that only query need not spend.
    from controlplane.config.alerts import AlertsConfig
    from controlplane.config.scaling import ControllerScalingConfig


class ControllerApi(Protocol):
    """Every remote call. Any of them fails if the controller is away; none lies on a request's path."""

    # --- replicas and gateways ------------------------------------------------------------------------------

    async def declare(
        self,
        tiers: tuple[TierSpec, ...],
        heartbeat_s: float,
        scaling: ControllerScalingConfig,
        alerts: AlertsConfig,
    ) -> None:
        """State the configuration. The last gateway to call it wins."""

    async def register(self, endpoint: Endpoint) -> None:
        """Make an endpoint known, or known again."""

    async def report(self, endpoint: Endpoint) -> ReportResponse:
        """Report an endpoint's state; the response says whether it has to register, whether its lease is
        known, and which commands its replica has to carry out."""
        ...

    async def deregister(self, endpoint_id: str, reason: str) -> None:
        """Remove an endpoint that stops on purpose, and end its lease."""

    async def gateway_report(self, info: GatewayInfo) -> bool:
        """Report a gateway's load; False if the gateway was unknown and has to declare the configuration."""
        ...

    async def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """Remove a gateway that stops on purpose."""

    async def still_running(self, endpoint_id: str) -> int | None:
        """Requests that gateways have in flight at a draining endpoint; None while that is not known."""
        ...

    async def snapshot(self, epoch: str, version: int, wait_s: float) -> ClusterSnapshot | None:
        """The snapshot, with secrets, as soon as it is newer than ``(epoch, version)``; None if that takes
        longer than ``wait_s``."""
        ...

    # --- leases ---------------------------------------------------------------------------------------------

    async def lease_gpus(
        self, holder: str, generation: int, node_id: str, shape: GangShape, tier: str = ""
    ) -> LeaseResponse:
        """Lease exact GPUs of a node to a replica. GRANTED and UNCHANGED carry the lease; WAIT and REFUSED
        say when to call again; with UNMANAGED the replica uses the GPUs that Ray assigned."""
        ...

    async def restore_lease(
        self, holder: str, generation: int, node_id: str, parts: tuple[GpuPart, ...]
    ) -> LeaseResponse:
        """Claim the lease that a running replica holds. REFUSED: another replica holds it, and the caller
        will get the command to retire."""
        ...

    async def release_lease(self, holder: str, generation: int | None = None) -> LeaseResponse:
        """Return a holder's GPUs; deregistering does so too."""
        ...

    async def may_start(self, tier: str) -> StartPermission:
        """Whether an engine of the tier may be started now; not while the tier is held or drained."""
        ...

    # --- scaling --------------------------------------------------------------------------------------------

    async def targets(self) -> Mapping[str, TierTarget]:
        """Tier → target replicas, and until when the target is valid. Raises NotSettled just after a restart:
        the previous targets stay valid."""
        ...

    async def scaling(self) -> ScalingReport:
        """Targets with their reasons, recommendations, and how well past recommendations did."""
        ...

    async def scale(
        self, tier: str, replicas: int | None, for_s: float | None = None, reason: str = ""
    ) -> ActionResponse:
        """Set a tier's replicas by hand, for ``for_s`` seconds or until changed; None ends that."""
        ...

    # --- operators ------------------------------------------------------------------------------------------

    async def cordon(self, subject: str, reason: str = "") -> ActionResponse:
        """Let nothing new start on a GPU, a node or in a tier; what runs there goes on."""
        ...

    async def uncordon(self, subject: str, reason: str = "") -> ActionResponse:
        """Use a GPU, a node or a tier again, or cancel an endpoint's drain."""
        ...

    async def drain(self, subject: str, reason: str = "") -> ActionResponse:
        """Cordon, and make what runs there leave."""
        ...

    async def restart(self, subject: str, reason: str = "") -> ActionResponse:
        """Replace the engine processes of an endpoint, a tier, a GPU or a node."""
        ...

    async def acknowledge_alert(self, rule: str, subject: str, by: str) -> ActionResponse:
        """Send no more repeats of a firing alert."""
        ...

    async def silence_alerts(
        self, rule: str, subject: str, for_s: float, reason: str, by: str
    ) -> ActionResponse:
        """Send nothing about matching alerts for a while; empty ``rule`` and ``subject`` match all."""
        ...

    async def unsilence_alerts(self, number: int, by: str) -> ActionResponse:
        """End a silence."""
        ...

    # --- keys -----------------------------------------------------------------------------------------------

    async def create_key(self, request: KeyRequest, by: str) -> KeyResponse:
        """Create an API key; ``by`` is who does, for the audit log. The key is in the response only."""
        ...

    async def revoke_key(self, subject: str, by: str) -> KeyResponse:
        """Make a key invalid, everywhere with the next snapshot; ``subject`` is its id or name."""
        ...

    async def rotate_key(self, subject: str, grace_s: float, by: str) -> KeyResponse:
        """Give a key a new secret; the old one stays valid for ``grace_s`` seconds."""
        ...

    async def keys(self) -> tuple[KeyRecord, ...]:
        """Every key without its secret, oldest first."""
        ...

    async def key_table(self) -> KeyTable:
        """The keys for gateways, which get it when ``keys_version`` of the snapshot changes."""
        ...

    # --- queries --------------------------------------------------------------------------------------------

    async def status(self) -> tuple[ClusterSnapshot, tuple[TierSpec, ...], tuple[Event, ...]]:
        """The snapshot without secrets, the configured tiers, and recent events."""
        ...

    async def gpus(self) -> tuple[GpuView, ...]:
        """Every GPU with its health, lease holders and last readings."""
        ...

    async def nodes(self) -> tuple[NodeView, ...]:
        """Every node with its CPUs, memory and disks."""
        ...

    async def alerts(self) -> AlertsResponse:
        """Firing and pending alerts, silences, and webhook deliveries."""
        ...

    async def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """The audit log after entry number ``after``, oldest first; numbers survive restarts. With a negative
        ``after``, the last ``limit`` entries."""
        ...

    async def history(
        self, series: tuple[str, ...], since_unix_s: float, until_unix_s: float
    ) -> Mapping[str, list[Point]]:
        """Stored points of series named by :func:`controlplane.controller.reports.series_of`."""
        ...

    async def plane_report(self, window_minutes: float = 60.0) -> PlaneReport:
        """What every tier and endpoint did in the last minutes. ValueError if the window is out of range."""
        ...

    async def requests(
        self,
        since_unix_s: float,
        slow: bool = False,
        failed: bool = False,
        tier: str = "",
        session: str = "",
        limit: int = 50,
        key: str = "",
        team: str = "",
    ) -> RequestsView:
        """Logged requests that ended since then, the slowest or else the newest first."""
        ...

    async def usage(
        self,
        since_unix_s: float,
        until_unix_s: float,
        by: UsageBy = UsageBy.TEAM,
        key: str = "",
        team: str = "",
        limit: int = 1000,
    ) -> UsageView:
        """What was used in the hours of a time, by key, team, tier or session."""
        ...

    async def sessions(
        self, since_unix_s: float, order: SessionOrder = SessionOrder.COST, limit: int = 20
    ) -> SessionsView:
        """Sessions of the hours since then, the largest first."""
        ...

    async def activity(self) -> Activity:
        """Migrations, restarts, holds and drains in progress, and the controller's own state."""
        ...


P = ParamSpec("P")
R = TypeVar("R")

Method: TypeAlias = Callable[Concatenate[ControllerApi, P], Coroutine[Any, Any, R]]
"""A method of the interface with its arguments and result, such as ``ControllerApi.events``."""
