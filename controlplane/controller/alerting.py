"""The controller's alerts: figures from what it knows, rules, the record of what happened, operators' wishes.

Plain Python with the controller's clocks, as :mod:`controlplane.controller.controller`; who is told is
:mod:`controlplane.controller.alert_delivery`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from controlplane.config.alerts import AlertsConfig
from controlplane.controller.controller import Controller
from controlplane.core.alerts import checkpoint
from controlplane.core.alerts.alert import Alert, AlertState, Silence, SubjectType
from controlplane.core.alerts.evaluator import AlertEvaluator
from controlplane.core.alerts.rules import NODE_LOST, TIER_MISSING, rule_named
from controlplane.core.alerts.signals import (
    AlertSignals,
    gpu_signals,
    merged,
    node_signals,
    plane_signals,
    slo_signals,
    tier_signals,
)
from controlplane.core.alerts.views import (
    AlertNotice,
    AlertsResponse,
    WebhookView,
    firing,
    notice,
    silences,
    view,
    worst_first,
)
from controlplane.core.domain.resource_name import MIN_PREFIX
from controlplane.core.json_values import StoredState
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.reconcile.migrations import OPERATOR
from controlplane.core.traffic.counters import named

TRAFFIC_S: Final = 300.0
"""How far figures of a tier's traffic look back."""
MAX_SILENCE_S: Final = 30 * 24 * 3600.0

BEGAN, OVER = "alert", "alert over"
"""Kinds of entries in the audit log."""

Source = Callable[[float], AlertSignals]
"""``now_s`` → some figures."""


class Alerting:
    """Not safe for use by several threads; the control loop's owns it.

    ``shift_s`` is wall clock less monotonic clock; ``store_warning`` says why the controller's memory is not
    safe. More figures may be supplied by adding to :attr:`sources`.
    """

    def __init__(
        self,
        controller: Controller,
        config: AlertsConfig,
        *,
        shift_s: float,
        store_warning: Callable[[], str] = lambda: "",
    ) -> None:
        self._controller = controller
        self._shift_s = shift_s
        self._store_warning = store_warning
        self._was_full = False
        self.watch = AlertEvaluator(config.changes(), config.repeat_s)
        self.sources: list[Source] = [self._traffic, self._own]

    def configure(self, config: AlertsConfig) -> None:
        """Other rules from now on; alerts of those that were switched off are over at the next look."""
        self.watch.configure(config.changes(), config.repeat_s)

    def look(self) -> tuple[AlertNotice, ...]:
        """Judge every rule; what must be told. Nothing happens while the controller does not know everybody,
        and after the plane was stopped on purpose."""
        controller, table = self._controller, self.watch.table
        if not controller.knows_all or controller.left:
            return ()
        now_s = controller.now_s()
        known = merged(source(now_s) for source in self.sources)
        changes = self.watch.evaluate(known, now_s)
        for alert in changes.fired:
            self._note(BEGAN, alert)
        for alert in changes.resolved:
            self._note(OVER, alert)
        if table.full and not self._was_full:
            controller.registry.note(
                "alerts left out", "controller", f"{len(table.alerts)} are as many as it keeps"
            )
        self._was_full = table.full
        self._forget_lost(known)
        self.show()
        return tuple(notice(alert, table, now_s, self._shift_s) for alert in changes.due)

    def show(self) -> None:
        """Let gateways know what fires, and how many replicas have to be there of each tier."""
        controller = self._controller
        controller.registry.show(
            firing(self.watch.table, controller.now_s(), self._shift_s), tuple(sorted(self._due().items()))
        )

    def answer(self, webhooks: tuple[WebhookView, ...]) -> AlertsResponse:
        """For people: what fires or is pending, the worst first, and silences."""
        table, now_s = self.watch.table, self._controller.now_s()
        views = worst_first(view(alert, table, now_s, self._shift_s) for alert in table.alerts)
        return AlertsResponse(tuple(views), silences(table, now_s, self._shift_s), webhooks)

    # --- operators ----------------------------------------------------------------------------------------

    def acknowledge(self, name: str, subject: str, by: str) -> ActionResponse:
        """Somebody looks after an alert that fires: it is not told again while it lasts."""
        rule = rule_named(name)
        if rule is None:
            return ActionResponse(ActionOutcome.UNKNOWN, _no_rule(name))
        of_rule = [
            alert
            for alert in self.watch.table.alerts
            if alert.rule.name == rule.name and alert.state is AlertState.FIRING
        ]
        found = [alert for alert in of_rule if alert.subject == subject] or [
            alert for alert in of_rule if len(subject) >= MIN_PREFIX and alert.subject.startswith(subject)
        ]
        if len(found) != 1:
            there = ", ".join(alert.subject for alert in of_rule[:5]) or "nothing"
            return ActionResponse(
                ActionOutcome.UNKNOWN,
                f"{rule.name} does not fire about one '{subject}'; it fires about {there}",
            )
        [alert] = found
        if alert.acknowledged:
            return ActionResponse(
                ActionOutcome.UNCHANGED, f"{alert.acknowledged} has acknowledged it", (alert.subject,)
            )
        self.watch.table.acknowledge(*alert.key, by)
        reason = f"{rule.name}: {by} looks after it"
        self._controller.registry.note(
            "alert acknowledged", alert.subject, reason, _tier(alert), actor=OPERATOR
        )
        self.show()
        return ActionResponse(
            ActionOutcome.DONE, f"{rule.name} about {alert.subject} is acknowledged by {by}", (alert.subject,)
        )

    def silence(self, name: str, subject: str, for_s: float, reason: str, by: str) -> ActionResponse:
        """Nothing is told of what matches, for a while; ``name`` and ``subject`` empty: all."""
        rule = rule_named(name) if name else None
        if name and rule is None:
            return ActionResponse(ActionOutcome.UNKNOWN, _no_rule(name))
        if not 0 < for_s <= MAX_SILENCE_S:
            return ActionResponse(
                ActionOutcome.REFUSED,
                f"a silence lasts up to {MAX_SILENCE_S / 86_400:g} days, not {for_s:g} s",
            )
        until_s = self._controller.now_s() + for_s
        silence = self.watch.table.silence(Silence(until_s, rule.name if rule else "", subject, reason, by))
        text = f"silence {silence.number}: {_matches(silence)} for {for_s:g} s"
        self._controller.registry.note(
            "silence", subject or "every subject", f"{text}: {reason} ({by})", actor=OPERATOR
        )
        self.show()
        return ActionResponse(ActionOutcome.DONE, text, (str(silence.number),))

    def unsilence(self, number: int, by: str) -> ActionResponse:
        """The end of a silence: what it kept back is told."""
        silence = self.watch.table.unsilence(number)
        if silence is None:
            return ActionResponse(
                ActionOutcome.UNKNOWN, f"there is no silence {number}: `tierplane alerts` lists them"
            )
        text = f"silence {number} ends: {_matches(silence)}"
        self._controller.registry.note(
            "silence ended", silence.subject or "every subject", f"{text} ({by})", actor=OPERATOR
        )
        self.show()
        return ActionResponse(ActionOutcome.DONE, text, (str(number),))

    # --- over a restart -----------------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """What has to survive the controller, by key."""
        return checkpoint.to_values(self.watch.table, self._shift_s)

    def restore(self, stored: StoredState) -> None:
        """Restore what was stored before a restart."""
        checkpoint.restore(stored, self.watch.table, self._shift_s)
        self.show()

    # --- figures ------------------------------------------------------------------------------------------

    def _traffic(self, now_s: float) -> AlertSignals:
        controller = self._controller
        found = controller.demand.figures(now_s, controller.heartbeat_s, TRAFFIC_S)
        targets = {
            spec.name: spec.attainment for spec in controller.registry.tiers if spec.attainment is not None
        }
        attainments = {tier: each.attainment for tier, each in found.items()}
        return merged((AlertSignals(named(found)), slo_signals(attainments, targets)))

    def _own(self, now_s: float) -> AlertSignals:
        controller = self._controller
        gateways = controller.registry.gateways
        in_flight: dict[str, int] = {}
        for gateway in gateways:
            for endpoint_id, count in gateway.in_flight_by_endpoint:
                in_flight[endpoint_id] = in_flight.get(endpoint_id, 0) + count
        tiers = tier_signals(
            self._due(),
            controller.registry.endpoints.values(),
            in_flight if gateways else None,
            controller.work.holds,
        )
        missing = {
            tier: int(signal.value or 0) for tier, signal in tiers.figures.get(TIER_MISSING, {}).items()
        }
        waiting = sum(gateway.queued for gateway in gateways) if gateways else None
        return merged(
            (
                tiers,
                plane_signals(waiting=waiting, store_warning=self._store_warning()),
                gpu_signals(controller.fleet, now_s),
                node_signals(controller.fleet, controller.lost_nodes, missing, now_s),
            )
        )

    def _due(self) -> dict[str, int]:
        """Tier → replicas that have to be there: none while an operator has drained it."""
        controller = self._controller
        drained = {tier for tier, hold in controller.work.holds.items() if hold.must_leave}
        base_targets = controller.base_targets()
        return {tier: 0 if tier in drained else count for tier, count in base_targets.items()}

    def _forget_lost(self, known: AlertSignals) -> None:
        """Nodes that everything has been replaced of, and of which nothing rings any more."""
        rings = {alert.subject for alert in self.watch.table.alerts if alert.rule.kind is SubjectType.NODE}
        for node_id, signal in known.figures.get(NODE_LOST, {}).items():
            if not signal.value and node_id not in rings:
                self._controller.lost_nodes.pop(node_id, None)

    def _note(self, kind: str, alert: Alert) -> None:
        self._controller.registry.note(kind, alert.subject, f"{alert.rule.name}: {alert.text}", _tier(alert))


def _tier(alert: Alert) -> str:
    return alert.subject if alert.rule.kind is SubjectType.TIER else ""


def _matches(silence: Silence) -> str:
    return f"{silence.rule or 'every rule'} about {silence.subject or 'every subject'}"


def _no_rule(name: str) -> str:
    return f"there is no alert rule '{name}': `tierplane alerts rules` lists them"
