"""The controller's registry: which endpoints and gateways there are, as a versioned snapshot.

All of it is soft state. Replicas and gateways report every ``heartbeat_s``; a new controller process starts
empty with a new epoch, answers "unknown" to the first report of each endpoint, and so makes them all register
again. Until they have had time to register, its snapshots are marked ``warming`` (see
:mod:`controlplane.core.cluster.snapshot`).

Plain Python with two clocks; :mod:`controlplane.controller.actor` puts it into a Ray actor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from controlplane.core.alerts.views import FiringAlert
from controlplane.core.cluster.snapshot import ClusterSnapshot, GatewayInfo, TierNote, TierScaling
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import ENDED, Endpoint, EndpointState, check_transition
from controlplane.core.domain.event import Event
from controlplane.errors import IllegalTransition

MISSED_REPORTS = 5
"""An endpoint or a gateway that has missed this many reports counts as gone."""
WARMING_REPORTS = 3
"""A new controller's snapshots count as incomplete for this many report intervals after the first report: a
process that has started may not be reachable at once."""
FAILED_SHOWN_S = 600.0
"""How long a failed endpoint stays listed after its last report, so that its diagnosis can be read."""
SILENT_REPORTS = 3
"""An endpoint that has missed this many reports is shown with the time of its last one."""
MAX_EVENTS = 500
"""Events in :attr:`Registry.events`."""
MAX_UNSAVED_EVENTS = 100_000
"""The most events that may wait for :meth:`Registry.take_events`."""
MAX_GONE = 1000
"""Ids of deregistered endpoints in a warming snapshot."""


class Registry:
    """The registry. Not safe for use by several threads; one event loop owns it."""

    def __init__(
        self, *, epoch: str, heartbeat_s: float, now_s: Callable[[], float], unix_s: Callable[[], float]
    ) -> None:
        self.epoch: Final = epoch
        """Names this controller process."""
        self.version = 1
        """Grows whenever an endpoint changed or a gateway came or went."""
        self.warming = True
        """Whether this process has just started and may not know every endpoint and gateway yet."""
        self.declared = False
        """Whether a gateway has declared the configuration to this process."""
        self.tiers: tuple[TierSpec, ...] = ()
        """The configured tiers, by the last :meth:`declare`."""
        self._heartbeat_s = heartbeat_s
        self._now_s = now_s
        self._unix_s = unix_s
        self._expired_s = now_s()
        """When :meth:`expire` ran last."""
        self._first_report_s: float | None = None
        self._scaling: tuple[TierScaling, ...] = ()
        self._endpoints: dict[str, Endpoint] = {}
        self.endpoints: Final = MappingProxyType(self._endpoints)
        """By id, with their secrets."""
        self._gateways: dict[str, GatewayInfo] = {}
        self.gateways: Final = MappingProxyType(self._gateways)
        """The last report of each gateway, by its id."""
        self._reported_s: dict[str, float] = {}
        """Endpoint or gateway id → its last report."""
        self._gone: deque[str] = deque(maxlen=MAX_GONE)
        self._notes: tuple[TierNote, ...] = ()
        self._silent: tuple[tuple[str, float], ...] = ()
        self._keys_version = ""
        self._living: set[str] = set()
        """Endpoint and gateway ids whose processes Ray has listed."""
        self._alerts: tuple[FiringAlert, ...] = ()
        self._due: tuple[tuple[str, int], ...] = ()
        self._draining: dict[str, int] = {}
        """Endpoint id → the first snapshot version in which it drains."""
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._unsaved: deque[Event] = deque(maxlen=MAX_UNSAVED_EVENTS)
        self._event_count = 0
        self._empty_since_s: float | None = self._expired_s
        self.note("started", "controller", f"epoch {epoch}")

    @property
    def events(self) -> tuple[Event, ...]:
        """The last :data:`MAX_EVENTS`, oldest first."""
        return tuple(self._events)

    def declare(self, tiers: Sequence[TierSpec], heartbeat_s: float) -> None:
        """Set the configured tiers; the last call wins."""
        self.tiers, self.declared = tuple(tiers), True
        self._heartbeat_s = heartbeat_s

    def publish_scaling(self, scaling: tuple[TierScaling, ...]) -> None:
        """Set what snapshots say about the tiers' scaling."""
        self._scaling = scaling
        self._changed()

    def publish_alerts(self, alerts: tuple[FiringAlert, ...], due: tuple[tuple[str, int], ...]) -> None:
        """Set what snapshots say about firing alerts, and about the replicas that each tier should have."""
        if (alerts, due) != (self._alerts, self._due):
            self._alerts, self._due = alerts, due
            self._changed()

    def publish_keys(self, version: str) -> None:
        """Set what snapshots say about the version of the API keys."""
        if version != self._keys_version:
            self._keys_version = version
            self._changed()

    def publish_notes(self, notes: tuple[TierNote, ...]) -> None:
        """Set what snapshots say about tiers that are not simply on."""
        if notes != self._notes:
            self._notes = notes
            self._changed()

    def observe_processes(self, living: Collection[str]) -> None:
        """Process Ray's list of the replicas whose processes live, by the unique ids that end the ids of
        endpoints and gateways. Those that were in it and no longer are have certainly ended: they leave at
        once, except that a failed endpoint stays listed with its diagnosis."""
        for key in (*self._endpoints, *self._gateways):
            if key.rpartition("-")[2] in living:
                self._living.add(key)
            elif key in self._living:
                self._living.discard(key)
                reason = "its process has ended"
                endpoint = self._endpoints.get(key)
                if endpoint is None or endpoint.state is not EndpointState.FAILED:
                    self.drop(key, "lost", reason)
                    self.gateway_gone(key, reason)
        self._living &= self._endpoints.keys() | self._gateways.keys()

    def drop_replaced(self, tier: str) -> None:
        """Drop the tier's failed endpoints that no longer report: others serve in their place."""
        silent_s = SILENT_REPORTS * self._heartbeat_s
        for endpoint in list(self._endpoints.values()):
            reported_s = self._reported_s.get(endpoint.endpoint_id, self._now_s())
            ended = endpoint.state is EndpointState.FAILED and self._now_s() - reported_s > silent_s
            if endpoint.tier == tier and ended:
                self.drop(endpoint.endpoint_id, "dropped", "others serve in its place")

    def register(self, endpoint: Endpoint) -> None:
        """Add an endpoint, or replace the one with the same id."""
        known = self._endpoints.get(endpoint.endpoint_id)
        self._reported(endpoint.endpoint_id)
        if known == endpoint:
            return
        self._put(endpoint)
        if known is None:
            self.note("registered", endpoint.endpoint_id, _describe(endpoint), endpoint.tier)

    def report(self, endpoint: Endpoint) -> bool:
        """Record an endpoint's state; False if the endpoint is unknown and has to register.

        A report of an older generation, or of a state that can't follow the known one, is refused: the
        registry stays as it was, and an event says so.
        """
        known = self._endpoints.get(endpoint.endpoint_id)
        if known is None:
            return False
        self._reported(endpoint.endpoint_id)
        if endpoint == known:
            return True
        try:
            check_transition(known.state, endpoint.state)
            if endpoint.generation < known.generation:
                raise IllegalTransition(f"generation {endpoint.generation} came after {known.generation}")
        except IllegalTransition as refused:
            self.note("refused", endpoint.endpoint_id, str(refused), endpoint.tier)
            return True
        self._put(endpoint)
        if endpoint.state != known.state or endpoint.generation != known.generation:
            self.note(endpoint.state.value, endpoint.endpoint_id, _describe(endpoint), endpoint.tier)
        return True

    def deregister(self, endpoint_id: str, reason: str) -> None:
        """Remove an endpoint that stops on purpose. While warming, unknown ids are remembered as gone too."""
        if self.warming and endpoint_id not in self._gone:
            self._gone.append(endpoint_id)
            self._changed()
        self.drop(endpoint_id, "deregistered", reason)

    def gateway_report(self, info: GatewayInfo) -> bool:
        """Record a gateway's state; False if the gateway was unknown before this report."""
        new = info.gateway_id not in self._gateways
        self._reported(info.gateway_id)
        self._gateways[info.gateway_id] = replace(info, seen_unix_s=self._unix_s())
        if new:
            self.note("gateway", info.gateway_id, f"answers on {info.url or 'the ingress only'}")
            self._changed()
        return not new

    def gateway_gone(self, gateway_id: str, reason: str) -> None:
        """Remove a gateway."""
        if self._gateways.pop(gateway_id, None) is not None:
            self._reported_s.pop(gateway_id, None)
            self.note("gateway gone", gateway_id, reason)
            self._changed()

    def expire(self) -> None:
        """Drop every endpoint and gateway that has missed ``MISSED_REPORTS`` reports, and end the warming.

        Call this about once per report interval. After a much longer gap between two calls the controller
        itself was not running, so no report could arrive: the gap is not counted.
        """
        now_s = self._now_s()
        gap_s = now_s - self._expired_s
        self._expired_s = now_s
        if gap_s > (MISSED_REPORTS - 1) * self._heartbeat_s:
            self._reported_s = {key: reported_s + gap_s for key, reported_s in self._reported_s.items()}
            self.note("stood still", "controller", f"for {gap_s:.1f} s; nothing is dropped for it")
        silent_limit_s = MISSED_REPORTS * self._heartbeat_s
        shortest_s = min(silent_limit_s, FAILED_SHOWN_S)
        for key in [key for key, at_s in self._reported_s.items() if now_s - at_s > shortest_s]:
            endpoint, silent_s = self._endpoints.get(key), now_s - self._reported_s[key]
            failed = endpoint is not None and endpoint.state == EndpointState.FAILED
            if silent_s > (FAILED_SHOWN_S if failed else silent_limit_s):
                reason = f"no report for {silent_s:.1f} s"
                self.drop(key, "dropped", reason)
                self.gateway_gone(key, reason)
        self._update_silent(now_s)
        first_s = self._first_report_s
        if self.warming and first_s is not None and now_s - first_s >= WARMING_REPORTS * self._heartbeat_s:
            self.warming = False
            self._gone.clear()
            self._changed()
        if self._gateways or any(item.state not in ENDED for item in self._endpoints.values()):
            self._empty_since_s = None
        elif self._empty_since_s is None:
            self._empty_since_s = now_s

    def _update_silent(self, now_s: float) -> None:
        late_s, shift_s = SILENT_REPORTS * self._heartbeat_s, self._unix_s() - now_s
        before = dict(self._silent)
        silent = tuple(
            (key, before.get(key, at_s + shift_s))
            for key in self._endpoints
            if now_s - (at_s := self._reported_s.get(key, now_s)) > late_s
        )
        if silent != self._silent:
            self._silent = silent
            self._changed()

    def still_running(self, endpoint_id: str) -> int | None:
        """Requests that gateways have in flight at a draining endpoint; None if that is not known yet.

        It is known once every gateway has reported since it saw the endpoint draining: an earlier report
        does not count what that gateway sent in the meantime.
        """
        since = self._draining.get(endpoint_id)
        if since is None:
            return None
        total = 0
        for gateway in self._gateways.values():
            epoch, version = gateway.snapshot
            if epoch != self.epoch or version < since:
                return None
            total += dict(gateway.in_flight_by_endpoint).get(endpoint_id, 0)
        return total

    def empty_for_s(self) -> float:
        """For how long there has been neither a gateway nor a living endpoint; 0 while there is one."""
        return 0.0 if self._empty_since_s is None else self._now_s() - self._empty_since_s

    def snapshot(self, *, secrets: bool) -> ClusterSnapshot:
        """The state now. Only gateways need ``secrets``."""
        endpoints: tuple[Endpoint, ...] = tuple(
            sorted(self._endpoints.values(), key=lambda endpoint: (endpoint.tier, endpoint.endpoint_id))
        )
        if not secrets:
            endpoints = tuple(replace(endpoint, secret="") for endpoint in endpoints)
        return ClusterSnapshot(
            epoch=self.epoch,
            version=self.version,
            unix_s=self._unix_s(),
            endpoints=endpoints,
            gateways=tuple(sorted(self._gateways.values(), key=lambda gateway: gateway.gateway_id)),
            warming=self.warming,
            gone=tuple(self._gone),
            scaling=self._scaling,
            alerts=self._alerts,
            due=self._due,
            notes=self._notes,
            silent=self._silent,
            keys_version=self._keys_version,
        )

    def note(
        self, kind: str, subject: str, reason: str, tier: str = "", *, actor: str = "controller"
    ) -> None:
        """Add an event."""
        self._event_count += 1
        event = Event(self._event_count, self._unix_s(), kind, subject, reason, tier, actor)
        self._events.append(event)
        self._unsaved.append(event)

    def take_events(self) -> tuple[Event, ...]:
        """The events since the last call, oldest first."""
        unsaved = tuple(self._unsaved)
        self._unsaved.clear()
        return unsaved

    def _reported(self, key: str) -> None:
        self._reported_s[key] = self._now_s()
        if self._first_report_s is None:
            self._first_report_s = self._now_s()
        self._empty_since_s = None

    def _put(self, endpoint: Endpoint) -> None:
        self._endpoints[endpoint.endpoint_id] = endpoint
        self._changed()
        if endpoint.state == EndpointState.DRAINING:
            self._draining.setdefault(endpoint.endpoint_id, self.version)

    def drop(self, endpoint_id: str, kind: str, reason: str) -> None:
        """Remove an endpoint; ``kind`` is the kind of the event about it."""
        endpoint = self._endpoints.pop(endpoint_id, None)
        self._draining.pop(endpoint_id, None)
        if endpoint is not None:
            self._reported_s.pop(endpoint_id, None)
            self.note(kind, endpoint_id, reason, endpoint.tier)
            self._changed()

    def _changed(self) -> None:
        self.version += 1


def _describe(endpoint: Endpoint) -> str:
    parts = [f"{endpoint.state}, generation {endpoint.generation}"]
    if endpoint.base_url and endpoint.state == EndpointState.READY:
        parts.append(endpoint.base_url)
    if endpoint.diagnosis:
        parts.append(endpoint.diagnosis)
    return ", ".join(parts)
