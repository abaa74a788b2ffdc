"""The alerts of a controller without Ray: signals, audit log, snapshots, operators' actions, restarts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from controlplane.config import ControllerConfig
from controlplane.config.alerts import AlertsConfig
from controlplane.controller.alert_delivery import AlertDelivery
from controlplane.controller.alerting import Alerting
from controlplane.core.alerts import rules as names
from controlplane.core.alerts.alert import AlertState, SubjectType
from controlplane.core.alerts.signals import AlertSignals
from controlplane.core.alerts.views import AlertNotice, AlertTransition, AlertView
from controlplane.core.cluster.snapshot import GatewayInfo, TierMode
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.json_values import StoredState, to_value
from controlplane.core.reconcile.commands import ActionOutcome
from controlplane.core.reconcile.migrations import CONTROLLER, TierHold
from controlplane.core.telemetry.series import Signal, known_now, missing
from controlplane.core.traffic.counters import TrafficCounters
from tests.support.controller import HEARTBEAT_S, World, xid

SHIFT_S = 5000.0
SPEC = TierSpec("small", "m", "simulated", 1, 10)


class Rig:
    """A world whose alerts are evaluated every second."""

    def __init__(
        self,
        rules: dict[str, Any] | None = None,
        replicas: int = 1,
        tiers: dict[str, int] | None = None,
        **alerts: Any,
    ) -> None:
        nodes = {name: [f"GPU-{name}-{i}" for i in range(2)] for name in ("node-a", "node-b")}
        self.world = World(nodes, tiers or {"small": replicas}, shift_s=SHIFT_S)
        self.warning = ""
        values = {"heartbeat_s": HEARTBEAT_S, "alerts": {"rules": rules or {}, **alerts}}
        self.config = ControllerConfig.model_validate(values)
        self.make()
        self.notified: list[AlertNotice] = []
        self.world.settle()

    def make(self) -> None:
        self.alerting = Alerting(
            self.world.controller,
            self.config.alerts,
            AlertDelivery((), {}, "plane"),
            store_warning=lambda: self.warning,
        )

    def step(self, count: int = 1) -> list[str]:
        """Let seconds pass; returns the notifications as ``transition rule subject``."""
        notified: list[AlertNotice] = []
        for _ in range(count):
            self.world.step()
            notified += self.alerting.evaluate()
        self.notified += notified
        return [
            f"{each.transition} {each.alert.rule.removeprefix('Tierplane')} {each.alert.subject}"
            for each in notified
        ]

    @property
    def firing(self) -> list[AlertView]:
        """The alerts that fire now."""
        return [each for each in self.alerting.response().alerts if each.state is AlertState.FIRING]

    def fail(self, tier: str = "small") -> None:
        """From now on no replica of the tier becomes ready."""
        for replica in self.world.replicas.values():
            if replica.endpoint.tier == tier:
                replica.starts_in = 10**6
                state = EndpointState.RESTARTING
                replica.endpoint = replace(replica.endpoint, state=state, diagnosis="out of memory")

    def mend(self) -> None:
        for replica in self.world.replicas.values():
            replica.starts_in = 1


QUICK = {"TierplaneTierDown": {"for_s": 3.0}}


def test_a_tier_without_endpoints_fires_once_and_resolves_when_one_is_ready() -> None:
    rig = Rig(QUICK)
    assert rig.step(20) == []
    rig.fail()
    assert rig.step(3) == []
    assert rig.step(20) == ["firing TierDown small"]
    [notice] = rig.notified
    assert notice.alert.summary == "Tier small has no ready endpoint."
    assert "restarting (out of memory)" in notice.alert.detail
    assert (notice.alert.value, notice.alert.threshold) == (0.0, 1)
    assert abs(notice.alert.since_unix_s - SHIFT_S - rig.world.clock.s) < 22
    registry = rig.world.registry
    assert [alert.rule for alert in registry.snapshot(secrets=False).alerts] == ["TierplaneTierDown"]
    rig.mend()
    assert rig.step(10) == ["resolved TierDown small"]
    assert rig.notified[-1].alert.detail == ""
    assert registry.snapshot(secrets=False).alerts == ()
    events = [event for event in registry.events if event.kind.startswith("alert")]
    assert [(event.kind, event.subject, event.tier) for event in events] == [
        ("alert", "small", "small"),
        ("alert over", "small", "small"),
    ]
    assert events[0].reason.startswith("TierplaneTierDown: Tier small has no ready endpoint: small-")


def test_a_drained_tier_and_one_of_zero_replicas_are_not_down() -> None:
    rig = Rig(QUICK)
    rig.world.controller.drain("small", "its weights change")
    assert rig.step(60) == []
    assert rig.world.registry.snapshot(secrets=False).due == (("small", 0),)
    none = Rig(QUICK, tiers={"small": 1, "none": 0})
    assert none.step(60) == []


def test_missing_replicas_fire_after_a_while() -> None:
    rig = Rig({"TierplaneReplicasMissing": {"for_s": 5.0}}, replicas=2)
    [first, _] = rig.world.replicas.values()
    first.endpoint = replace(first.endpoint, state=EndpointState.RESTARTING)
    first.starts_in = 10**6
    assert rig.step(20) == ["firing ReplicasMissing small"]
    first.starts_in = 0
    assert rig.step(20) == ["resolved ReplicasMissing small"]


def test_a_held_tier_fires_with_the_diagnosis() -> None:
    rig = Rig()
    now_s = rig.world.clock.s
    hold = TierHold("bad flag", now_s + SHIFT_S, CONTROLLER, now_s + SHIFT_S + 600)
    rig.world.controller.restore(StoredState({"hold/small": to_value(hold)}))
    assert rig.step() == ["firing TierHeld small"]
    assert rig.notified[0].alert.detail == "bad flag"
    rig.world.controller.uncordon("small")
    assert rig.step() == ["resolved TierHeld small"]


def test_failed_gpus_fire_and_those_that_an_operator_cordoned_do_not() -> None:
    rig = Rig()
    rig.world.controller.cordon("GPU-node-b-1", "a fan rattles")
    rig.world.events.append(xid("node-b", "GPU-node-b-0", 79))
    assert rig.step(3) == ["firing GpuOutOfUse GPU-node-b-0"]
    assert "79" in rig.notified[0].alert.detail


def test_a_hot_gpu_fires_and_resolves_by_its_thresholds() -> None:
    rig = Rig({"TierplaneGpuHot": {"threshold": 60.0, "for_s": 2.0}})
    rig.world.samples["node-a"] = {"GPU-node-a-0": {"temperature_c": 61}}
    assert rig.step(5) == ["firing GpuHot GPU-node-a-0"]
    rig.world.samples["node-a"] = {"GPU-node-a-0": {"temperature_c": 59}}
    assert rig.step(10) == [], "not cool enough"
    rig.world.samples["node-a"] = {"GPU-node-a-0": {"temperature_c": 57}}
    assert rig.step(10) == ["resolved GpuHot GPU-node-a-0"]


def test_a_silent_agent_fires_and_its_gpus_do_not() -> None:
    rig = Rig({"TierplaneGpuHot": {"threshold": 60.0, "for_s": 0.0}})
    rig.world.samples["node-a"] = {"GPU-node-a-0": {"temperature_c": 59}}
    rig.step(3)
    rig.world.silent.add("node-a")
    rig.world.samples["node-a"] = {"GPU-node-a-0": {"temperature_c": 99}}
    assert rig.step(80) == []
    assert rig.step(20) == ["firing NodeSilent node-a"]
    rig.world.silent.clear()
    rig.world.samples.clear()
    assert rig.step(61) == ["resolved NodeSilent node-a"]


def test_a_lost_node_fires_until_all_its_replicas_are_replaced() -> None:
    rig = Rig(replicas=2)
    rig.step()
    rig.world.nodes.pop("node-a")
    assert rig.step(3) == ["firing NodeLost node-a"]
    assert rig.notified[0].alert.detail == "it had replicas of small"
    assert rig.world.ready("small") < 2
    notified = rig.step(70)
    assert rig.world.ready("small") == 2
    assert notified == ["resolved NodeLost node-a"]
    rig.step()
    assert rig.world.controller.lost_nodes == {}


def test_an_empty_or_drained_node_may_be_removed() -> None:
    rig = Rig()
    empty = ({"node-a", "node-b"} - {item.endpoint.node_id for item in rig.world.replicas.values()}).pop()
    rig.world.nodes.pop(empty)
    assert rig.step(5) == []
    drained = Rig(replicas=1)
    drained.world.controller.cordon("node-a", "a new kernel")
    drained.world.nodes.pop("node-a")
    assert drained.step(3) == []


def test_a_store_that_can_not_be_written_fires() -> None:
    rig = Rig()
    rig.warning = "disk full: in memory only"
    assert rig.step(40) == ["firing StoreUnsafe plane"]
    assert rig.notified[0].alert.detail == "disk full: in memory only"
    rig.warning = ""
    assert rig.step(40) == ["resolved StoreUnsafe plane"]


def test_queue_and_saturation_are_unknown_without_a_gateway() -> None:
    rig = Rig({"TierplaneQueueLong": {"for_s": 0.0}, "TierplaneTierSaturated": {"for_s": 0.0}})

    def report(queued: int, in_flight: int) -> None:
        [name] = rig.world.replicas
        info = GatewayInfo("g1", "n", "", queued=queued, in_flight_by_endpoint=((name, in_flight),))
        rig.world.controller.gateway_report(info)

    report(51, 10)
    assert sorted(rig.step()) == ["firing QueueLong plane", "firing TierSaturated small"]
    rig.step(30)
    assert rig.world.registry.gateways == {}
    assert {alert.state for alert in rig.alerting.response().alerts} == {AlertState.FIRING}
    report(0, 0)
    assert sorted(rig.step()) == ["resolved QueueLong plane", "resolved TierSaturated small"]


def test_rules_about_traffic_use_the_gateways_counters() -> None:
    rig = Rig({"TierplaneRequestsFail": {"for_s": 2.0}, "TierplaneSloMissed": {"for_s": 2.0}})
    controller = rig.world.controller
    ok = failed = 0

    def second(more_ok: int, more_failed: int) -> list[str]:
        nonlocal ok, failed
        ok, failed = ok + more_ok, failed + more_failed
        counted = TrafficCounters("small", ok + failed, ok + failed, failed, ok=ok, failed=failed)
        controller.gateway_report(GatewayInfo("g1", "n", "", traffic=(counted,)))
        controller.record_traffic(["small"])
        return rig.step()

    controller.declare([replace(SPEC, attainment=0.95)], HEARTBEAT_S)
    notified = [text for _ in range(10) for text in second(0, 10)]
    assert notified == [], "one burst is no sample"
    notified = [text for _ in range(320) for text in second(99, 1)]
    assert notified == [], "one in a hundred"
    notified = [text for _ in range(80) for text in second(50, 50)]
    assert sorted(notified) == ["firing RequestsFail small", "firing SloMissed small"]
    [ratio] = [each.alert.value for each in rig.notified if each.alert.rule == "TierplaneRequestsFail"]
    assert 0.1 < ratio < 0.5
    notified = [text for _ in range(320) for text in second(100, 0)]
    assert sorted(notified) == ["resolved RequestsFail small", "resolved SloMissed small"]
    notified = [text for _ in range(200) for text in second(0, 1)]
    notified += [text for _ in range(200) for text in second(0, 0)]
    assert notified.count("firing RequestsFail small") == 1
    notified += [text for _ in range(200) for text in second(0, 0)]
    assert "resolved RequestsFail small" in notified, "no request comes any more"


def test_few_requests_fire_no_ratio() -> None:
    """One client at night: three requests in five minutes, all of which failed."""
    rig = Rig({"TierplaneRequestsFail": {"for_s": 2.0}})
    failed = 0
    for each in range(600):
        failed += each % 100 == 0
        counted = TrafficCounters("small", failed, failed, failed, failed=failed)
        rig.world.controller.gateway_report(GatewayInfo("g1", "n", "", traffic=(counted,)))
        rig.world.controller.record_traffic(["small"])
        assert rig.step() == []


def test_an_alert_shows_the_value_that_violated_and_recovers_before_it_resolves() -> None:
    rig = Rig({"TierplaneTierDown": {"for_s": 5.0}})
    rig.step(3)
    rig.fail()
    assert rig.step(10) == ["firing TierDown small"]
    rig.mend()
    rig.step(4)
    [view] = [each for each in rig.alerting.response().alerts if each.rule == "TierplaneTierDown"]
    assert (view.state, view.value, view.current) == (AlertState.RECOVERING, 0.0, 1.0)
    assert view.recovering_since_unix_s is not None
    assert view.recovering_since_unix_s > view.since_unix_s
    [shown] = rig.world.registry.snapshot(secrets=False).alerts
    assert shown.state is AlertState.RECOVERING
    rig.fail()
    assert rig.step(1) == []
    [view] = [each for each in rig.alerting.response().alerts if each.rule == "TierplaneTierDown"]
    assert (view.state, view.recovering_since_unix_s) == (AlertState.FIRING, None)
    rig.mend()
    assert rig.step(12) == ["resolved TierDown small"]


def test_a_first_start_is_not_down() -> None:
    """Every first start is slow: the tier is starting, for as long as its engines may take to load."""
    rig = Rig(QUICK)
    rig.world.tiers["large"] = 1
    controller = rig.world.controller
    specs = [SPEC, replace(SPEC, name="large", expected_start_s=90.0, start_limit_s=300.0)]
    controller.declare(specs, HEARTBEAT_S)
    rig.world.step()
    [replica] = [item for item in rig.world.replicas.values() if item.endpoint.tier == "large"]
    replica.starts_in = 10**6
    assert rig.step(200) == []
    note = rig.world.registry.snapshot(secrets=False).note_of("large")
    assert note is not None
    assert (note.mode, "usually takes up to 90 s" in note.reason) == (TierMode.STARTING, True)
    assert rig.step(120) == ["firing TierDown large"], "its time is over"
    replica.starts_in = 0
    assert rig.step(20) == ["resolved TierDown large"]
    replica.endpoint = replace(replica.endpoint, state=EndpointState.RESTARTING)
    replica.starts_in = 10**6
    assert rig.step(10) == ["firing TierDown large"], "it has served before"


def test_a_first_start_whose_engine_is_lost_is_down_at_once() -> None:
    rig = Rig(QUICK)
    rig.world.tiers["large"] = 1
    rig.world.controller.declare([SPEC, replace(SPEC, name="large")], HEARTBEAT_S)
    rig.world.step()
    rig.fail("large")
    assert rig.step(10) == ["firing TierDown large"]


def test_a_tier_that_has_served_is_not_starting_after_a_restart_of_the_controller() -> None:
    rig = Rig(QUICK)
    rig.step(3)
    rig.fail()
    stored = rig.world.restart_controller(same_cluster=True)
    assert stored["served"] == ["small"]
    rig.make()
    assert rig.step(20) == ["firing TierDown small"]


def test_each_tier_is_compared_with_its_own_slo() -> None:
    tiers = {"strict": 0.99, "loose": 0.9, "silent": None}
    rig = Rig({"TierplaneSloMissed": {"for_s": 2.0}}, tiers=dict.fromkeys(tiers, 1))
    controller = rig.world.controller
    controller.declare(
        [replace(SPEC, name=name, attainment=promised) for name, promised in tiers.items()], HEARTBEAT_S
    )
    judged = missed = 0
    for each in range(130):
        judged, missed = judged + 100, missed + 3
        counted = [TrafficCounters(name, judged, judged, missed, ok=judged) for name in tiers]
        controller.gateway_report(GatewayInfo("g1", "n", "", traffic=tuple(counted)))
        controller.record_traffic(tiers)
        notified = rig.step()
        assert notified == [] or (notified == ["firing SloMissed strict"] and each > 60)
    [view] = rig.firing
    assert (view.rule, view.subject) == ("TierplaneSloMissed", "strict")
    assert view.value == pytest.approx(3.0)
    assert view.detail == "97 % of its requests met the SLO, 99 % must"


def test_a_rule_whose_signals_are_missing_does_not_fire(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig({"TierplaneRequestsFail": {"for_s": 0.0}, "TierplaneTierIdle": {"for_s": 0.0}})
    supplied: dict[str, dict[str, Signal]] = {}
    monkeypatch.setattr(rig.alerting, "_traffic_signals", lambda: AlertSignals(supplied))

    def fresh(value: float) -> dict[str, Signal]:
        return {"small": known_now(value)}

    supplied["tier/failed_ratio"] = {"small": missing("no request ended")}
    supplied[names.TIER_SATURATION] = fresh(0.0)
    assert rig.step() == [], "how many requests come is not known"
    supplied["tier/requests_per_s"] = fresh(0.5)
    supplied[names.TIER_SAMPLE] = fresh(10.0)
    supplied["tier/failed_ratio"] = fresh(0.2)
    assert sorted(rig.step()) == ["firing RequestsFail small", "firing TierIdle small"]
    supplied["tier/requests_per_s"] = fresh(2.0)
    assert rig.step() == ["resolved TierIdle small"]


def test_nothing_is_evaluated_before_all_have_reported_or_after_the_plane_was_stopped() -> None:
    rig = Rig({"TierplaneTierDown": {"for_s": 0.0}})
    rig.fail()
    rig.world.start_controller("e2", settle_s=10.0)
    rig.make()
    assert rig.step(8) == []
    assert "firing TierDown small" in rig.step(20)
    gone = Rig(QUICK)
    gone.world.controller.gateway_report(GatewayInfo("g1", "n", ""))
    gone.world.controller.gateway_gone("g1", "stopped")
    gone.fail()
    assert gone.step(30) == []
    gone.world.controller.gateway_report(GatewayInfo("g2", "n", ""))
    assert gone.step(10) == ["firing TierDown small"]


def test_a_rule_that_is_switched_off_is_not_evaluated() -> None:
    rig = Rig({"TierplaneTierDown": {"for_s": 1.0, "enabled": False}})
    rig.fail()
    assert rig.step(10) == []
    other = Rig({"TierplaneTierDown": {"for_s": 1.0, "severity": "info"}})
    other.fail()
    assert other.step(10) == ["firing TierDown small"]
    assert other.notified[0].alert.severity == "info"


def test_new_settings_apply_at_once() -> None:
    rig = Rig(QUICK)
    rig.fail()
    assert rig.step(10) == ["firing TierDown small"]
    rules = {"TierplaneTierDown": {"enabled": False}, "TierplaneReplicasMissing": {"for_s": 1.0}}
    rig.alerting.configure(AlertsConfig.model_validate({"rules": rules}))
    assert sorted(rig.step(10)) == ["firing ReplicasMissing small", "resolved TierDown small"]


def test_alerts_of_a_removed_subject_resolve() -> None:
    rig = Rig(QUICK)
    rig.fail()
    assert rig.step(10) == ["firing TierDown small"]
    rig.world.controller.declare((), HEARTBEAT_S)
    assert rig.step(50) == []
    assert rig.step(20) == ["resolved TierDown small"]
    assert rig.notified[-1].alert.detail == "it is no longer there"


# --- operators ---------------------------------------------------------------------------------------------


def test_an_acknowledged_alert_is_not_repeated() -> None:
    rig = Rig(QUICK, repeat_s=10.0)
    rig.fail()
    assert rig.step(26) == ["firing TierDown small", "repeated TierDown small", "repeated TierDown small"]
    done = rig.alerting.acknowledge("tierdown", "small", "ada")
    assert done.outcome is ActionOutcome.DONE
    assert rig.alerting.acknowledge("TierplaneTierDown", "small", "bob").outcome is ActionOutcome.UNCHANGED
    assert rig.step(60) == []
    [shown] = rig.world.registry.snapshot(secrets=False).alerts
    assert shown.acknowledged == "ada"
    event = rig.world.registry.events[-1]
    assert (event.kind, event.subject, event.actor) == ("alert acknowledged", "small", "operator")
    rig.mend()
    assert rig.step(10) == ["resolved TierDown small"]


@pytest.mark.parametrize(
    ("name", "subject", "words"),
    [
        ("Nonsense", "small", "no alert rule 'Nonsense'"),
        ("TierDown", "large", "it fires about small"),
        ("TierHeld", "small", "it fires about nothing"),
    ],
)
def test_only_a_firing_alert_can_be_acknowledged(name: str, subject: str, words: str) -> None:
    rig = Rig(QUICK)
    rig.fail()
    rig.step(10)
    answer = rig.alerting.acknowledge(name, subject, "ada")
    assert answer.outcome is ActionOutcome.UNKNOWN
    assert words in answer.reason


def test_subjects_may_be_shortened() -> None:
    rig = Rig()
    rig.world.events.append(xid("node-b", "GPU-node-b-0", 79))
    rig.step(3)
    assert rig.alerting.acknowledge("GpuOutOfUse", "GPU-no", "ada").subjects == ("GPU-node-b-0",)


def test_a_silence_suppresses_matching_alerts_and_is_listed() -> None:
    rig = Rig(QUICK)
    done = rig.alerting.silence("TierDown", "small", 60.0, reason="an upgrade", by="ada")
    assert (done.outcome, done.subjects) == (ActionOutcome.DONE, ("1",))
    rig.fail()
    assert rig.step(20) == []
    answer = rig.alerting.response()
    [alert] = rig.firing
    assert alert.silenced_until_unix_s is not None
    assert rig.world.registry.snapshot(secrets=False).alerts[0].silenced
    [silence] = answer.silences
    assert (silence.rule, silence.subject, silence.by) == ("TierplaneTierDown", "small", "ada")
    assert rig.alerting.unsilence(2, "ada").outcome is ActionOutcome.UNKNOWN
    assert rig.alerting.unsilence(1, "ada").outcome is ActionOutcome.DONE
    assert rig.step() == ["firing TierDown small"]
    kinds = [event.kind for event in rig.world.registry.events if event.actor == "operator"]
    assert kinds == ["silence", "silence ended"]


def test_an_invalid_silence_is_refused() -> None:
    rig = Rig()
    assert rig.alerting.silence("Nonsense", "", 60.0, reason="x", by="ada").outcome is ActionOutcome.UNKNOWN
    assert rig.alerting.silence("", "", 0.0, reason="x", by="ada").outcome is ActionOutcome.REFUSED
    assert rig.alerting.silence("", "", 1e9, reason="x", by="ada").outcome is ActionOutcome.REFUSED
    assert rig.alerting.silence("", "", 60.0, reason="x", by="ada").outcome is ActionOutcome.DONE


def test_the_worst_is_listed_first() -> None:
    rig = Rig({"TierplaneTierDown": {"for_s": 2.0}, "TierplaneGpuBusy": {"threshold": 0.3, "for_s": 0.0}})
    rig.fail()
    rig.step()
    states = [(alert.severity.value, alert.state.value) for alert in rig.alerting.response().alerts]
    assert states == [("critical", "pending"), ("warning", "pending"), *[("info", "firing")] * 4]
    rig.step(5)
    assert rig.alerting.response().alerts[0].state is AlertState.FIRING


# --- over a restart ----------------------------------------------------------------------------------------


def test_alerts_and_silences_survive_the_controller() -> None:
    rig = Rig(QUICK, repeat_s=1000.0)
    rig.fail()
    assert rig.step(10) == ["firing TierDown small"]
    rig.alerting.acknowledge("TierDown", "small", "ada")
    rig.alerting.silence("", "large", 600.0, reason="an upgrade", by="ada")
    values = json.loads(json.dumps(rig.alerting.checkpoint()))
    [before] = rig.firing
    rig.world.shift_s += 7.0
    rig.world.start_controller("e2")
    rig.make()
    rig.alerting.restore(StoredState(values))
    shown = rig.world.registry.snapshot(secrets=False)
    assert [alert.acknowledged for alert in shown.alerts] == ["ada"], "snapshots have it at once"
    assert rig.step(20) == [], "it was notified before"
    answer = rig.alerting.response()
    [after] = rig.firing
    assert (after.acknowledged, after.since_unix_s) == ("ada", pytest.approx(before.since_unix_s))
    assert answer.silences[0].subject == "large"
    rig.mend()
    assert rig.step(20) == ["resolved TierDown small"]
    assert {key.split("/")[0] for key in rig.alerting.checkpoint()} == {"silence"}


def test_restored_alerts_of_unknown_rules_are_dropped_and_of_switched_off_rules_resolve() -> None:
    rig = Rig(QUICK)
    rig.fail()
    rig.step(10)
    values = rig.alerting.checkpoint()
    [key] = values
    values["alert/Old/small"] = {**values[key], "rule": "Old"}
    rig.config = ControllerConfig.model_validate(
        {"heartbeat_s": HEARTBEAT_S, "alerts": {"rules": {"TierplaneTierDown": {"enabled": False}}}}
    )
    rig.make()
    rig.alerting.restore(StoredState(values))
    assert rig.step(2) == ["resolved TierDown small"]
    assert rig.notified[-1].transition is AlertTransition.RESOLVED
    assert rig.notified[-1].alert.detail == "the rule is switched off"


def test_the_snapshot_version_grows_only_when_the_set_of_firing_alerts_changes() -> None:
    rig = Rig(QUICK)
    rig.step(5)
    registry = rig.world.registry
    before = registry.version
    rig.step(30)
    assert registry.version == before
    rig.fail()
    rig.step(10)
    fired = registry.version
    rig.step(30)
    assert fired > before
    assert registry.version == fired


def test_many_gpus_are_evaluated_quickly() -> None:
    nodes = {f"n{i}": [f"GPU-{i}-{j}" for j in range(8)] for i in range(100)}
    world = World(nodes, {"small": 1})
    world.settle()
    alerting = Alerting(world.controller, AlertsConfig(), AlertDelivery((), {}, "plane"))
    world.step()
    began_s = time.thread_time()
    for _ in range(5):
        alerting.evaluate()
    assert (time.thread_time() - began_s) / 5 < 0.25, "800 GPUs"
    kinds = {alert.kind for alert in alerting.response().alerts}
    assert kinds <= {SubjectType.GPU, SubjectType.TIER}
