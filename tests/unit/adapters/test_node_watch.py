"""Which of an agent's events count at first contact."""

from __future__ import annotations

from controlplane.adapters.node_watch import RECENT_S, recent
from controlplane.core.samples import GpuEvent, GpuEventKind
from tests.support_control import node_sample


def test_at_first_contact_only_recent_events_count() -> None:
    events = [
        GpuEvent("n", "a", seq, unix_s, GpuEventKind.XID, "g", 79)
        for seq, unix_s in ((1, 0.0), (2, 5000.0 - RECENT_S), (3, 4999.0))
    ]
    assert [event.seq for event in recent(events, node_sample("n", 1, 5000.0))] == [2, 3]
    assert recent(events, None) == events
