from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.alerts import table as table_module
from controlplane.core.alerts.alert import Alert, AlertRule, AlertState, Severity, Silence
from controlplane.core.alerts.table import AlertTable, Observation
from controlplane.core.telemetry.series import Freshness, Signal, known_now, missing

RULE = AlertRule(
    "queue",
    Severity.WARNING,
    50.0,
    "more than {threshold} requests wait for {subject} for {lasts}",
    clear=40.0,
    for_s=30.0,
    repeat_s=600.0,
)


class Ticks:
    """A table that is given one value every ten seconds."""

    def __init__(self) -> None:
        self.table = AlertTable()
        self.now_s = 0.0

    def tick(self, *values: float | Signal, subject: str = "light") -> list[Alert]:
        due: list[Alert] = []
        for value in values:
            self.now_s += 10.0
            signal = value if isinstance(value, Signal) else known_now(value)
            due += self.table.observe([Observation(RULE, subject, signal)], self.now_s).due
        return due


def test_it_fires_after_for_s_and_resolves_past_the_clear_threshold() -> None:
    ticks = Ticks()
    assert ticks.tick(60, 60, 60) == []
    (fired,) = ticks.tick(61, 61, 61, 61)
    assert (fired.state, fired.text) == (
        AlertState.FIRING,
        "more than 50 requests wait for light for 30 s",
    )
    assert ticks.tick(45, 45, 45, 45, 45) == []
    assert ticks.tick(40, 40, 40) == []
    (resolved,) = ticks.tick(40)
    assert resolved.state is AlertState.RESOLVED
    assert ticks.table.alerts == ()


def test_a_break_restarts_the_wait_in_both_directions() -> None:
    ticks = Ticks()
    assert ticks.tick(60, 60, 60, 50, 60, 60, 60) == []
    assert len(ticks.tick(60)) == 1
    assert ticks.tick(10, 10, 10, 45, 10, 10, 10) == []
    assert len(ticks.tick(10)) == 1


def test_missing_and_stale_signals_change_nothing() -> None:
    ticks = Ticks()
    ticks.tick(60, 60, 60, 60)
    before = ticks.table.alerts
    assert ticks.tick(*[missing("gone")] * 100, Signal(Freshness.STALE, 0.0, 9.0)) == []
    assert ticks.table.alerts == before


def test_notifications_repeat_until_the_alert_is_acknowledged() -> None:
    ticks = Ticks()
    assert len(ticks.tick(*[60] * 130)) == 3
    assert ticks.table.acknowledge("queue", "light", "ops")
    assert ticks.tick(*[60] * 200) == []
    (resolved,) = ticks.tick(*[0] * 10)
    assert resolved.state is AlertState.RESOLVED


def test_only_a_firing_alert_can_be_acknowledged() -> None:
    ticks = Ticks()
    ticks.tick(60)
    assert not ticks.table.acknowledge("queue", "light", "ops")
    assert not ticks.table.acknowledge("queue", "other", "ops")


def test_a_silence_covers_its_subject_until_it_expires() -> None:
    ticks = Ticks()
    ticks.table.silence(Silence(until_s=100.0, subject="light", reason="an upgrade"))
    assert ticks.tick(60, 60, 60, 60, 60) == []
    assert len(ticks.tick(60, 60, 60, 60, 60, 60, subject="capable")) == 1
    assert len(ticks.tick(60)) == 1
    assert ticks.table.silences == ()


def test_an_alert_that_was_never_notified_resolves_without_a_notification() -> None:
    ticks = Ticks()
    ticks.table.silence(Silence(until_s=70.0))
    assert ticks.tick(60, 60, 60, 60) == []
    assert ticks.tick(*[0] * 20) == []


@given(st.lists(st.one_of(st.floats(0, 100), st.none()), max_size=80))
def test_firing_and_resolved_alternate(values: list[float | None]) -> None:
    ticks = Ticks()
    due = ticks.tick(*[missing("gone") if value is None else value for value in values])
    states = [alert.state for alert in due]
    starts = [state for i, state in enumerate(states) if i == 0 or state is not states[i - 1]]
    assert starts == [(AlertState.FIRING, AlertState.RESOLVED)[i % 2] for i in range(len(starts))]
    assert len(ticks.table.alerts) <= 1


def test_a_silenced_alert_fires_and_resolves_without_notifications() -> None:
    table = AlertTable()
    table.silence(Silence(until_s=1000.0))
    rule = replace(RULE, for_s=0.0)
    first = table.observe([Observation(rule, "light", known_now(60))], 1.0)
    assert [alert.subject for alert in first.fired] == ["light"]
    assert (first.resolved, first.due) == ((), ())
    again = table.observe([Observation(rule, "light", known_now(60))], 2.0)
    assert (again.fired, again.resolved) == ((), ())
    last = table.observe([Observation(rule, "light", known_now(0))], 3.0)
    assert [alert.state for alert in last.resolved] == [AlertState.RESOLVED]


def test_a_rule_applies_only_while_its_precondition_is_met() -> None:
    table = AlertTable()
    rule = replace(RULE, for_s=0.0)
    assert table.observe([Observation(rule, "light", known_now(60), precondition_met=False)], 1.0).fired == ()
    assert table.observe([Observation(rule, "light", known_now(60))], 2.0).fired != ()
    assert (
        table.observe([Observation(rule, "light", known_now(60), precondition_met=False)], 3.0).resolved != ()
    )


def test_alerts_of_a_subject_that_is_gone_resolve() -> None:
    ticks = Ticks()
    ticks.tick(60, 60, 60, 60)
    [ended] = ticks.table.end([("queue", "light"), ("queue", "other")], "it is gone", 50.0).due
    assert (ended.state, ended.detail) == (AlertState.RESOLVED, "it is gone")
    assert ticks.table.alerts == ()
    ticks.tick(60)
    assert ticks.table.end([("queue", "light")], "gone", 70.0).resolved == (), "it was only pending"


def test_ending_a_silence_by_its_number_sends_the_notification() -> None:
    ticks = Ticks()
    first = ticks.table.silence(Silence(until_s=1000.0, rule="queue"))
    second = ticks.table.silence(Silence(until_s=2000.0, rule="other"))
    assert (first.number, second.number) == (1, 2)
    assert ticks.tick(*[60] * 6) == []
    [alert] = ticks.table.alerts
    assert ticks.table.silenced_by(alert, ticks.now_s) == first
    assert ticks.table.unsilence(7) is None
    assert ticks.table.unsilence(1) == first
    assert ticks.table.silences == (second,)
    assert len(ticks.tick(60)) == 1


def test_silences_and_alerts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "MAX_ALERTS", 3)
    table = AlertTable()
    rule = replace(RULE, for_s=0.0)
    seen = [Observation(rule, f"s{i}", known_now(60)) for i in range(5)]
    assert len(table.observe(seen, 1.0).fired) == 3
    assert table.full
    assert len(table.observe([Observation(rule, "s0", known_now(0)), seen[4]], 2.0).fired) == 1
    for i in range(1200):
        table.silence(Silence(until_s=10.0 + i))
    assert len(table.silences) == 1000
    assert table.silences[-1].number == 1200


def test_after_a_restart_an_alert_still_fires_and_starts_again_to_resolve() -> None:
    before = Ticks()
    before.tick(60, 60, 60, 60, 10, 10)
    [alert] = before.table.alerts
    assert alert.cleared_since_s is not None
    after = Ticks()
    after.now_s = before.now_s
    after.table.restore([alert], [Silence(until_s=10_000.0, subject="capable", number=4)])
    assert after.tick(60) == [], "it was notified before the restart"
    [resolved] = after.tick(0, 0, 0, 0)
    assert resolved.state is AlertState.RESOLVED
    assert after.table.silence(Silence(until_s=1.0)).number == 5


@given(
    st.lists(st.one_of(st.floats(0, 100), st.none(), st.just("stale")), max_size=60),
    st.integers(0, 59),
)
def test_a_missing_signal_neither_fires_nor_resolves(
    values: list[float | str | None], acknowledged_at: int
) -> None:
    ticks = Ticks()
    for i, value in enumerate(values):
        before = ticks.table.alerts
        if value is None or value == "stale":
            signal = missing("gone") if value is None else Signal(Freshness.STALE, 99.0, 20.0)
            assert ticks.tick(signal) == []
            assert ticks.table.alerts == before
        elif isinstance(value, float):
            ticks.tick(value)
        if i == acknowledged_at:
            ticks.table.acknowledge("queue", "light", "ops")


@given(st.lists(st.floats(0, 100), max_size=200), st.floats(0, 300))
def test_notifications_are_never_closer_than_repeat_s(values: list[float], until_s: float) -> None:
    ticks = Ticks()
    ticks.table.silence(Silence(until_s=until_s))
    times: list[float] = []
    for value in values:
        for alert in ticks.tick(value):
            if alert.state is AlertState.FIRING:
                times.append(ticks.now_s)
            else:
                times.clear()
            assert all(b - a >= RULE.repeat_s for a, b in itertools.pairwise(times))
