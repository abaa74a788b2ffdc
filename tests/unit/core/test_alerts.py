from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.alerts import (
    Alert,
    AlertBook,
    AlertRule,
    AlertState,
    Observation,
    Severity,
    Silence,
)
from controlplane.core.telemetry import Freshness, Signal, missing

RULE = AlertRule(
    "queue",
    Severity.WARNING,
    50.0,
    "{value} requests wait for {subject}",
    clear=40.0,
    for_s=30.0,
    repeat_s=600.0,
)


def fresh(value: float) -> Signal:
    return Signal(Freshness.FRESH, value, 0.0)


class Book:
    def __init__(self) -> None:
        self.book = AlertBook()
        self.now_s = 0.0

    def tick(self, *values: float | Signal, subject: str = "light") -> list[Alert]:
        told: list[Alert] = []
        for value in values:
            self.now_s += 10.0
            signal = value if isinstance(value, Signal) else fresh(value)
            told += self.book.observe([Observation(RULE, subject, signal)], self.now_s)
        return told


def test_it_fires_once_after_its_time_and_resolves_past_its_own_threshold() -> None:
    book = Book()
    assert book.tick(60, 60, 60) == []
    (fired,) = book.tick(61, 61, 61, 61)
    assert (fired.state, fired.text) == (AlertState.FIRING, "61 requests wait for light")
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


def test_what_is_gone_on_purpose_is_forgotten() -> None:
    book = Book()
    book.tick(60, 60, 60, 60)
    book.book.forget("light")
    assert book.book.alerts == ()


@given(st.lists(st.one_of(st.floats(0, 100), st.none()), max_size=80))
def test_firing_and_resolved_take_turns(values: list[float | None]) -> None:
    rule_once = Book()
    told = rule_once.tick(*[missing("gone") if value is None else value for value in values])
    states = [alert.state for alert in told]
    starts = [state for i, state in enumerate(states) if i == 0 or state is not states[i - 1]]
    assert starts == [(AlertState.FIRING, AlertState.RESOLVED)[i % 2] for i in range(len(starts))]
    assert len(rule_once.book.alerts) <= 1
