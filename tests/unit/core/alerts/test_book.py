from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.alerts.book import (
    Alert,
    AlertBook,
    AlertRule,
    AlertState,
    Observation,
    Severity,
    Silence,
)
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


class Book:
    def __init__(self) -> None:
        self.book = AlertBook()
        self.now_s = 0.0

    def tick(self, *values: float | Signal, subject: str = "light") -> list[Alert]:
        told: list[Alert] = []
        for value in values:
            self.now_s += 10.0
            signal = value if isinstance(value, Signal) else known_now(value)
            told += self.book.observe([Observation(RULE, subject, signal)], self.now_s).told
        return told


def test_it_fires_once_after_its_time_and_resolves_past_its_own_threshold() -> None:
    book = Book()
    assert book.tick(60, 60, 60) == []
    (fired,) = book.tick(61, 61, 61, 61)
    assert (fired.state, fired.text) == (
        AlertState.FIRING,
        "more than 50 requests wait for light for 30 s",
    )
    assert book.tick(45, 45, 45, 45, 45) == []
    assert book.tick(40, 40, 40) == []
    (resolved,) = book.tick(40)
    assert resolved.state is AlertState.RESOLVED
    assert book.book.alerts == ()


def test_a_break_begins_anew_in_both_directions() -> None:
    book = Book()
    assert book.tick(60, 60, 60, 50, 60, 60, 60) == []
    assert len(book.tick(60)) == 1
    assert book.tick(10, 10, 10, 45, 10, 10, 10) == []
    assert len(book.tick(10)) == 1


def test_what_is_not_known_changes_nothing() -> None:
    book = Book()
    book.tick(60, 60, 60, 60)
    before = book.book.alerts
    assert book.tick(*[missing("gone")] * 100, Signal(Freshness.STALE, 0.0, 9.0)) == []
    assert book.book.alerts == before


def test_it_is_told_again_until_somebody_takes_it() -> None:
    book = Book()
    assert len(book.tick(*[60] * 130)) == 3
    assert book.book.acknowledge("queue", "light", "ops")
    assert book.tick(*[60] * 200) == []
    (resolved,) = book.tick(*[0] * 10)
    assert resolved.state is AlertState.RESOLVED


def test_only_what_fires_can_be_taken() -> None:
    book = Book()
    book.tick(60)
    assert not book.book.acknowledge("queue", "light", "ops")
    assert not book.book.acknowledge("queue", "other", "ops")


def test_a_silence_is_for_what_it_names_and_for_its_time() -> None:
    book = Book()
    book.book.silence(Silence(until_s=100.0, subject="light", reason="an upgrade"))
    assert book.tick(60, 60, 60, 60, 60) == []
    assert len(book.tick(60, 60, 60, 60, 60, 60, subject="capable")) == 1
    assert len(book.tick(60)) == 1
    assert book.book.silences == ()


def test_what_was_never_told_is_not_said_to_be_over() -> None:
    book = Book()
    book.book.silence(Silence(until_s=70.0))
    assert book.tick(60, 60, 60, 60) == []
    assert book.tick(*[0] * 20) == []


@given(st.lists(st.one_of(st.floats(0, 100), st.none()), max_size=80))
def test_firing_and_resolved_take_turns(values: list[float | None]) -> None:
    rule_once = Book()
    told = rule_once.tick(*[missing("gone") if value is None else value for value in values])
    states = [alert.state for alert in told]
    starts = [state for i, state in enumerate(states) if i == 0 or state is not states[i - 1]]
    assert starts == [(AlertState.FIRING, AlertState.RESOLVED)[i % 2] for i in range(len(starts))]
    assert len(rule_once.book.alerts) <= 1


def test_what_began_and_ended_is_told_apart_from_what_must_be_told() -> None:
    book = AlertBook()
    book.silence(Silence(until_s=1000.0))
    rule = replace(RULE, for_s=0.0)
    first = book.observe([Observation(rule, "light", known_now(60))], 1.0)
    assert [alert.subject for alert in first.begun] == ["light"]
    assert (first.ended, first.told) == ((), ())
    again = book.observe([Observation(rule, "light", known_now(60))], 2.0)
    assert (again.begun, again.ended) == ((), ())
    last = book.observe([Observation(rule, "light", known_now(0))], 3.0)
    assert [alert.state for alert in last.ended] == [AlertState.RESOLVED]


def test_a_rule_counts_only_while_what_it_needs_is_given() -> None:
    book = AlertBook()
    rule = replace(RULE, for_s=0.0)
    assert book.observe([Observation(rule, "light", known_now(60), given=False)], 1.0).begun == ()
    assert book.observe([Observation(rule, "light", known_now(60))], 2.0).begun != ()
    assert book.observe([Observation(rule, "light", known_now(60), given=False)], 3.0).ended != ()


def test_what_is_gone_is_over_for_whoever_heard_of_it() -> None:
    book = Book()
    book.tick(60, 60, 60, 60)
    [ended] = book.book.end([("queue", "light"), ("queue", "other")], "it is gone", 50.0).told
    assert (ended.state, ended.detail) == (AlertState.RESOLVED, "it is gone")
    assert book.book.alerts == ()
    book.tick(60)
    assert book.book.end([("queue", "light")], "gone", 70.0).ended == (), "it was only pending"


def test_a_silence_is_ended_by_its_number_and_then_it_is_told() -> None:
    book = Book()
    first = book.book.silence(Silence(until_s=1000.0, rule="queue"))
    second = book.book.silence(Silence(until_s=2000.0, rule="other"))
    assert (first.number, second.number) == (1, 2)
    assert book.tick(*[60] * 6) == []
    [alert] = book.book.alerts
    assert book.book.silenced_by(alert, book.now_s) == first
    assert book.book.unsilence(7) is None
    assert book.book.unsilence(1) == first
    assert book.book.silences == (second,)
    assert len(book.tick(60)) == 1


def test_silences_and_alerts_are_bounded() -> None:
    book = AlertBook(limit=3)
    rule = replace(RULE, for_s=0.0)
    seen = [Observation(rule, f"s{i}", known_now(60)) for i in range(5)]
    assert len(book.observe(seen, 1.0).begun) == 3
    assert book.full
    assert len(book.observe([Observation(rule, "s0", known_now(0)), seen[4]], 2.0).begun) == 1
    for i in range(1200):
        book.silence(Silence(until_s=10.0 + i))
    assert len(book.silences) == 1000
    assert book.silences[-1].number == 1200


def test_after_a_restart_it_goes_on_and_begins_to_resolve_anew() -> None:
    before = Book()
    before.tick(60, 60, 60, 60, 10, 10)
    [alert] = before.book.alerts
    assert alert.right_since_s is not None
    after = Book()
    after.now_s = before.now_s
    after.book.restore([alert], [Silence(until_s=10_000.0, subject="capable", number=4)])
    assert after.tick(60) == [], "it was told before"
    [resolved] = after.tick(0, 0, 0, 0)
    assert resolved.state is AlertState.RESOLVED
    assert after.book.silence(Silence(until_s=1.0)).number == 5


@given(
    st.lists(st.one_of(st.floats(0, 100), st.none(), st.just("stale")), max_size=60),
    st.integers(0, 59),
)
def test_a_missing_signal_neither_fires_nor_resolves(
    values: list[float | str | None], acknowledged_at: int
) -> None:
    book = Book()
    for i, value in enumerate(values):
        before = book.book.alerts
        if value is None or value == "stale":
            signal = missing("gone") if value is None else Signal(Freshness.STALE, 99.0, 20.0)
            assert book.tick(signal) == []
            assert book.book.alerts == before
        elif isinstance(value, float):
            book.tick(value)
        if i == acknowledged_at:
            book.book.acknowledge("queue", "light", "ops")


@given(st.lists(st.floats(0, 100), max_size=200), st.floats(0, 300))
def test_it_is_never_told_twice_within_its_time(values: list[float], until_s: float) -> None:
    book = Book()
    book.book.silence(Silence(until_s=until_s))
    times: list[float] = []
    for value in values:
        for alert in book.tick(value):
            if alert.state is AlertState.FIRING:
                times.append(book.now_s)
            else:
                times.clear()
            assert all(b - a >= RULE.repeat_s for a, b in itertools.pairwise(times))
