from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.telemetry.accounting import (
    MAX_OWNERS,
    MAX_SESSIONS,
    EndpointPriceMeter,
    UsageLedger,
)


def test_two_requests_at_a_time_share_the_price() -> None:
    meter = EndpointPriceMeter(2.0, 0.0)
    one = meter.start(0.0)
    two = meter.start(1.0)
    assert meter.stop(one, 3.0) == pytest.approx(2.0 * 1 + 2.0 * 2 / 2)
    assert meter.stop(two, 4.0) == pytest.approx(2.0 * 2 / 2 + 2.0 * 1)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 50)), min_size=1, max_size=20))
def test_the_sum_of_charges_is_the_busy_time(spans: list[tuple[float, float]]) -> None:
    meter = EndpointPriceMeter(3.0, 0.0)
    moments = [(start, 1, i) for i, (start, _) in enumerate(spans)]
    moments += [(start + length, 0, i) for i, (start, length) in enumerate(spans)]
    readings: dict[int, float] = {}
    charged = busy = last = 0.0
    for now_s, begins, i in sorted(moments):
        if readings:
            busy += now_s - last
        last = now_s
        if begins:
            readings[i] = meter.start(now_s)
        elif i in readings:
            charged += meter.stop(readings.pop(i), now_s)
    assert charged == pytest.approx(3.0 * busy, abs=1e-6)


def test_the_next_tier_is_priced_by_its_own_tokens() -> None:
    ledger = UsageLedger(["small", "large"])
    assert ledger.record("small", "", "s", 5, 5, 1.0) is None
    assert ledger.record("large", "", "", 5, 5, 4.0) is None
    assert ledger.record("small", "", "s", 10, 10, 2.0) == pytest.approx(8.0)
    usage = ledger.session("", "s")
    assert usage is not None
    assert (usage.requests, usage.unpriced_requests) == (2, 1)
    assert usage.gpu_seconds == pytest.approx(3.0)
    assert ledger.tiers["small"].next_tier_gpu_seconds == pytest.approx(8.0)


def test_sessions_are_bounded() -> None:
    ledger = UsageLedger(["small"])
    for i in range(MAX_SESSIONS + 5):
        ledger.record("small", "", f"s{i}", 1, 1, 0.1)
    assert ledger.session("", "s0") is None
    assert ledger.session("", f"s{MAX_SESSIONS}") is not None


def test_owners_see_their_own_usage_and_sessions() -> None:
    ledger = UsageLedger(["small", "large"])
    ledger.record("small", "search", "s", 10, 1, 1.0)
    ledger.record("large", "mail", "s", 20, 2, 2.0)
    assert {tier: usage.prompt_tokens for tier, usage in ledger.of_owner("search").items()} == {"small": 10}
    assert {tier: usage.prompt_tokens for tier, usage in ledger.of_owner("mail").items()} == {"large": 20}
    of_search, of_mail = ledger.session("search", "s"), ledger.session("mail", "s")
    assert of_search is not None
    assert of_mail is not None
    assert (of_search.prompt_tokens, of_mail.prompt_tokens) == (10, 20)
    assert ledger.session("", "s") is None
    for number in range(MAX_OWNERS):
        ledger.record("small", f"team{number}", "", 1, 1, 0.1)
    assert ledger.of_owner("search") == {}
