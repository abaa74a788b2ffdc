"""The controller's alerts: signals from its state, the rules, notifications, and operators' silences.

Plain Python with the controller's clocks; :mod:`controlplane.controller.alert_delivery` sends notifications.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from controlplane.config.alerts import AlertsConfig
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.controller import Controller
from controlplane.core.alerts import checkpoint
from controlplane.core.alerts.alert import ACTIVE, Alert, Silence, SubjectType
from controlplane.core.alerts.evaluator import AlertEvaluator
from controlplane.core.alerts.rules import NODE_LOST, TIER_MISSING, TIER_SAMPLE, rule_named
from controlplane.core.alerts.signals import AlertSignals, merged, plane_signals, slo_signals, tier_signals
from controlplane.core.alerts.views import (
    AlertNotice,
    AlertsResponse,
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
"""The window of the signals about a tier's traffic."""
MAX_SILENCE_S: Final = 30 * 24 * 3600.0

FIRED, RESOLVED = "alert", "alert over"
"""Kinds of events."""


class Alerting:
    """Not safe for use by several threads; the controller's event loop owns it.

    ``store_warning`` says why the controller's state would not survive a restart (empty: it would), and
    ``unreadable`` names the values of the store that could not be read.
    """

    def __init__(
        self,
        controller: Controller,
        config: AlertsConfig,
        delivery: AlertDelivery,
        *,
        store_warning: Callable[[], str] = lambda: "",
        unreadable: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._controller = controller
        self.config = config
        self._delivery = delivery
        self._store_warning = store_warning
        self._unreadable = unreadable
        self._was_full = False
        self._evaluator = AlertEvaluator(config.changes(), config.repeat_s)
        self._table = self._evaluator.table

    def configure(self, config: AlertsConfig) -> None:
        """Use other rules and webhooks from now on. Alerts of rules that are switched off resolve at the next
        evaluation."""
        if config == self.config:
            return
        self.config = config
        self._evaluator.configure(config.changes(), config.repeat_s)
        self._delivery.configure(config.webhooks)

    def step(self) -> None:
        """Evaluate every rule and send the notifications that are due."""
        self._delivery.deliver(self.evaluate())

    def evaluate(self) -> tuple[AlertNotice, ...]:
        """Evaluate every rule; the notifications that are due. Does nothing while the controller may not
        decide, and after the plane was stopped on purpose."""
        controller, table = self._controller, self._table
        if not controller.may_decide or controller.stopped:
            return ()
        now_s, shift_s = controller.now_s(), controller.shift_s
        signals = merged((self._traffic_signals(), self._state_signals()))
        changes = self._evaluator.evaluate(signals, now_s)
        for alert in changes.fired:
            self._note(FIRED, alert)
        for alert in changes.resolved:
            self._note(RESOLVED, alert)
        if table.full and not self._was_full:
            controller.note(
                "alerts left out", "controller", f"{len(table.alerts)} alerts are as many as are tracked"
            )
        self._was_full = table.full
        self._forget_replaced_nodes(signals)
        self._publish()
        return tuple(notice(alert, table, now_s, shift_s) for alert in changes.due)

    def response(self) -> AlertsResponse:
        """Alerts that fire or are pending, the worst first; silences; deliveries."""
        table, now_s, shift_s = self._table, self._controller.now_s(), self._controller.shift_s
        views = worst_first(view(alert, table, now_s, shift_s) for alert in table.alerts)
        return AlertsResponse(tuple(views), silences(table, now_s, shift_s), self._delivery.views)

    def _publish(self) -> None:
        """Publish the firing alerts in snapshots."""
        controller = self._controller
        controller.publish_alerts(firing(self._table, controller.now_s(), controller.shift_s))

    # --- operators ----------------------------------------------------------------------------------------

    def acknowledge(self, name: str, subject: str, by: str) -> ActionResponse:
        """Send no more repeats of a firing alert."""
        rule = rule_named(name)
        if rule is None:
            return ActionResponse(ActionOutcome.UNKNOWN, _no_rule(name))
        of_rule = [
            alert for alert in self._table.alerts if alert.rule.name == rule.name and alert.state in ACTIVE
        ]
        found = [alert for alert in of_rule if alert.subject == subject] or [
            alert for alert in of_rule if len(subject) >= MIN_PREFIX and alert.subject.startswith(subject)
        ]
        if len(found) != 1:
            subjects = ", ".join(alert.subject for alert in of_rule[:5]) or "nothing"
            return ActionResponse(
                ActionOutcome.UNKNOWN,
                f"{rule.name} does not fire about one '{subject}'; it fires about {subjects}",
            )
        [alert] = found
        if alert.acknowledged:
            return ActionResponse(
                ActionOutcome.UNCHANGED, f"{alert.acknowledged} has acknowledged it", (alert.subject,)
            )
        self._table.acknowledge(*alert.key, by)
        reason = f"{rule.name}: acknowledged by {by}"
        self._controller.note("alert acknowledged", alert.subject, reason, _tier(alert), actor=OPERATOR)
        self._publish()
        return ActionResponse(
            ActionOutcome.DONE, f"{rule.name} about {alert.subject} is acknowledged by {by}", (alert.subject,)
        )

    def silence(self, name: str, subject: str, for_s: float, *, reason: str, by: str) -> ActionResponse:
        """Send nothing about matching alerts for ``for_s`` seconds; an empty ``name`` or ``subject`` matches
        every rule or subject."""
        rule = rule_named(name) if name else None
        if name and rule is None:
            return ActionResponse(ActionOutcome.UNKNOWN, _no_rule(name))
        if not 0 < for_s <= MAX_SILENCE_S:
            return ActionResponse(
                ActionOutcome.REFUSED,
                f"a silence lasts up to {MAX_SILENCE_S / 86_400:g} days, not {for_s:g} s",
            )
        until_s = self._controller.now_s() + for_s
        silence = self._table.silence(
            Silence(until_s, rule.name if rule else "", subject, reason=reason, by=by)
        )
        text = f"silence {silence.number}: {_matches(silence)} for {for_s:g} s"
        self._controller.note(
            "silence", subject or "every subject", f"{text}: {reason} ({by})", actor=OPERATOR
        )
        self._publish()
        return ActionResponse(ActionOutcome.DONE, text, (str(silence.number),))

    def unsilence(self, number: int, by: str) -> ActionResponse:
        """End a silence; alerts that it held back are notified at the next evaluation."""
        silence = self._table.unsilence(number)
        if silence is None:
            return ActionResponse(
                ActionOutcome.UNKNOWN, f"there is no silence {number}: `tierplane alerts` lists them"
            )
        text = f"silence {number} ends: {_matches(silence)}"
        self._controller.note(
            "silence ended", silence.subject or "every subject", f"{text} ({by})", actor=OPERATOR
        )
        self._publish()
        return ActionResponse(ActionOutcome.DONE, text, (str(number),))

    # --- over a restart -----------------------------------------------------------------------------------

    def checkpoint(self) -> dict[str, Any]:
        """What has to survive the controller's process, as JSON values by key."""
        return checkpoint.to_values(self._table, self._controller.shift_s) | self._delivery.checkpoint()

    def restore(self, stored: StoredState) -> None:
        """Restore a checkpoint."""
        controller = self._controller
        checkpoint.restore(stored, self._table, controller.shift_s, controller.now_s(), MAX_SILENCE_S)
        self._delivery.restore(stored)
        self._publish()

    # --- signals ------------------------------------------------------------------------------------------

    def _traffic_signals(self) -> AlertSignals:
        figures = self._controller.traffic_figures(TRAFFIC_S)
        targets = {
            spec.name: spec.attainment for spec in self._controller.tiers if spec.attainment is not None
        }
        attainments = {tier: each.attainment for tier, each in figures.items()}
        samples = self._controller.traffic_samples(TRAFFIC_S)
        return merged(
            (
                AlertSignals({**named(figures), TIER_SAMPLE: samples}),
                slo_signals(attainments, targets),
            )
        )

    def _state_signals(self) -> AlertSignals:
        controller = self._controller
        gateways = controller.gateways.values()
        in_flight: dict[str, int] = {}
        for gateway in gateways:
            for endpoint_id, count in gateway.in_flight_by_endpoint:
                in_flight[endpoint_id] = in_flight.get(endpoint_id, 0) + count
        tiers = tier_signals(
            controller.due_replicas(),
            controller.endpoints.values(),
            in_flight if gateways else None,
            controller.tier_holds,
        )
        missing = {
            tier: int(signal.value or 0) for tier, signal in tiers.figures.get(TIER_MISSING, {}).items()
        }
        waiting = sum(gateway.queued for gateway in gateways) if gateways else None
        return merged(
            (
                tiers,
                plane_signals(
                    waiting=waiting, store_warning=self._store_warning(), unreadable=self._unreadable()
                ),
                *controller.alert_signals(missing),
            )
        )

    def _forget_replaced_nodes(self, signals: AlertSignals) -> None:
        """Forget lost nodes whose replicas were all replaced, once no alert about them is left."""
        alerted = {alert.subject for alert in self._table.alerts if alert.rule.kind is SubjectType.NODE}
        for node_id, signal in signals.figures.get(NODE_LOST, {}).items():
            if not signal.value and node_id not in alerted:
                self._controller.forget_lost_node(node_id)

    def _note(self, kind: str, alert: Alert) -> None:
        self._controller.note(kind, alert.subject, f"{alert.rule.name}: {alert.text}", _tier(alert))


def _tier(alert: Alert) -> str:
    return alert.subject if alert.rule.kind is SubjectType.TIER else ""


def _matches(silence: Silence) -> str:
    return f"{silence.rule or 'every rule'} about {silence.subject or 'every subject'}"


def _no_rule(name: str) -> str:
    return f"there is no alert rule '{name}': `tierplane alerts rules` lists them"
