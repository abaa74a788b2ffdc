from __future__ import annotations

import pytest

from controlplane.core.gpus.leases import GpuCapacity, GpuLease, GpuPart, LeaseOutcome, LeaseTable

GPUS = {
    f"GPU-{index}": GpuCapacity(f"GPU-{index}", node_id="n1" if index < 4 else "n2", memory_bytes=80)
    for index in range(6)
}


def whole(*indices: int) -> list[GpuPart]:
    return [GpuPart(f"GPU-{index}") for index in indices]


def snapshot(table: LeaseTable) -> tuple[dict[str, GpuLease], list[tuple[str, ...]]]:
    return dict(table.leases), [table.holders(uuid) for uuid in GPUS]


def test_a_gang_in_the_order_requested() -> None:
    table = LeaseTable()
    response = table.acquire("a", whole(2, 0), GPUS, generation=1, now_s=5)
    assert response.outcome is LeaseOutcome.GRANTED
    assert response.lease == GpuLease("a", 1, "n1", tuple(whole(2, 0)), 5)
    assert response.lease.gpu_uuids == ("GPU-2", "GPU-0")
    assert (table.used("GPU-2"), table.used("GPU-1")) == ((1000, 0), (0, 0))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "no GPU was requested"),
        (whole(1, 1), "the same GPU was requested twice"),
        ([GpuPart("GPU-1", 0)], "GPU-1: 0 thousandths and 0 bytes are not a valid share"),
        ([GpuPart("GPU-1", 1001)], "GPU-1: 1001 thousandths and 0 bytes are not a valid share"),
        ([GpuPart("GPU-1", 500, -1)], "GPU-1: 500 thousandths and -1 bytes are not a valid share"),
        (whole(1, 9), "GPU-9 is not known"),
        (whole(1, 5), "the GPUs are on several nodes: n1, n2"),
        (whole(1, 3), "GPU-3 is not available: XID 79"),
        (whole(1, 0), "1000 thousandths of GPU-0 are held by a"),
        ([GpuPart("GPU-2", 500, 10)], "600 thousandths of GPU-2 are held by b"),
        ([GpuPart("GPU-2", 100, 41)], "GPU-2 has 80 bytes, 81 would be held"),
    ],
)
def test_a_refusal_says_why_and_changes_nothing(parts: list[GpuPart], reason: str) -> None:
    table = LeaseTable()
    table.acquire("a", whole(0), GPUS, generation=1, now_s=0)
    table.acquire("b", [GpuPart("GPU-2", 600, 40)], GPUS, generation=1, now_s=0)
    before = snapshot(table)
    unavailable = {**GPUS, "GPU-3": GpuCapacity("GPU-3", "n1", 80, unavailable="XID 79")}
    response = table.acquire("c", parts, unavailable, generation=1, now_s=1)
    assert (response.outcome, response.reason, response.lease) == (LeaseOutcome.REFUSED, reason, None)
    assert snapshot(table) == before


def test_shares_of_one_gpu() -> None:
    table = LeaseTable()
    for now_s, holder in enumerate("abc"):
        response = table.acquire(holder, [GpuPart("GPU-0", 300, 20)], GPUS, generation=1, now_s=now_s)
        assert response.outcome is LeaseOutcome.GRANTED
    assert table.holders("GPU-0") == ("a", "b", "c")
    assert table.used("GPU-0") == (900, 60)
    assert table.used("GPU-0", without="b") == (600, 40)
    assert table.acquire("d", whole(0), GPUS, generation=1, now_s=9).outcome is LeaseOutcome.REFUSED


def test_a_repeated_request_returns_the_existing_lease() -> None:
    table = LeaseTable()
    first = table.acquire("a", whole(0, 1), GPUS, generation=3, now_s=0)
    again = table.acquire("a", whole(2, 3), GPUS, generation=3, now_s=7)
    assert again.outcome is LeaseOutcome.UNCHANGED
    assert first.lease is not None
    assert again.lease == GpuLease("a", 3, "n1", first.lease.parts, 7)
    assert table.acquire("a", whole(2), GPUS, generation=2, now_s=8).outcome is LeaseOutcome.REFUSED
    newer = table.acquire("a", whole(1, 2), GPUS, generation=4, now_s=9)
    assert newer.outcome is LeaseOutcome.GRANTED
    assert [table.holders(f"GPU-{index}") for index in range(3)] == [(), ("a",), ("a",)]


def test_release_is_of_one_generation_and_once() -> None:
    table = LeaseTable()
    table.acquire("a", whole(0), GPUS, generation=2, now_s=0)
    assert table.release("a", generation=1).outcome is LeaseOutcome.UNKNOWN
    assert table.holders("GPU-0") == ("a",)
    assert table.release("a", generation=2).outcome is LeaseOutcome.GRANTED
    assert table.release("a", generation=2).outcome is LeaseOutcome.UNKNOWN
    assert table.release("a").outcome is LeaseOutcome.UNKNOWN
    assert snapshot(table) == snapshot(LeaseTable())


def test_a_lease_expires_without_its_holder() -> None:
    table = LeaseTable()
    table.acquire("a", whole(0), GPUS, generation=1, now_s=0)
    table.acquire("b", whole(1), GPUS, generation=1, now_s=0)
    assert table.renew("a", 20)
    assert table.renew("a", 3), "an earlier time changes nothing"
    assert table.leases["a"] == GpuLease("a", 1, "n1", tuple(whole(0)), 20)
    assert not table.renew("c", 20)
    assert table.reap(now_s=30, ttl_s=30) == ()
    [expired] = table.reap(now_s=31, ttl_s=30)
    assert expired.holder == "b"
    assert (table.holders("GPU-0"), table.holders("GPU-1")) == (("a",), ())


def test_a_new_controller_restores_leases_from_their_holders() -> None:
    old = LeaseTable()
    old.acquire("a", whole(0, 1), GPUS, generation=1, now_s=0)
    old.acquire("b", [GpuPart("GPU-2", 500, 30)], GPUS, generation=4, now_s=2)
    new = LeaseTable()
    assert [response.outcome for response in new.restore(old.leases.values())] == [LeaseOutcome.GRANTED] * 2
    assert snapshot(new) == snapshot(old)
    assert [response.outcome for response in new.restore(old.leases.values())] == [LeaseOutcome.UNCHANGED] * 2
    conflict, stale, odd = new.restore(
        [
            GpuLease("c", 1, "n1", tuple(whole(1)), 3),
            GpuLease("d", 1, "n1", tuple(whole(3, 3)), 5),
            GpuLease("b", 3, "n1", tuple(whole(3)), 4),
        ]
    )
    assert (conflict.outcome, conflict.reason) == (
        LeaseOutcome.REFUSED,
        "1000 thousandths of GPU-1 are held by a",
    )
    assert (stale.outcome, stale.reason) == (LeaseOutcome.REFUSED, "generation 4 is newer")
    assert odd.reason == "the same GPU was requested twice"
    assert snapshot(new) == snapshot(old)
