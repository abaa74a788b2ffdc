"""Whatever is requested of the lease table, in whatever order: no GPU is leased twice or over-committed."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane.core.gpus.leases import (
    GpuCapacity,
    GpuLease,
    GpuPart,
    LeaseOutcome,
    LeaseTable,
)
from controlplane.core.placement.gangs import WHOLE_MILLI

UUIDS = tuple(f"GPU-{index}" for index in range(5))
MEMORY = 100
holders = st.sampled_from("abcdef")
generations = st.integers(1, 3)
parts = st.lists(
    st.builds(
        GpuPart, st.sampled_from(UUIDS), st.sampled_from([-1, 250, 500, 1000, 1500]), st.integers(-1, 120)
    ),
    max_size=3,
)


class Leasing(RuleBasedStateMachine):
    """One controller's lease table, and the lease that each holder was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.now_s = 0.0
        self.granted: dict[str, GpuLease] = {}
        self.seen_version = 0
        self.seen: dict[str, tuple[GpuPart, ...]] = {}
        """The parts by holder as a reader knows them that only reads the changes."""

    def capacities(self, out: set[str]) -> dict[str, GpuCapacity]:
        return {
            uuid: GpuCapacity(uuid, "n1" if uuid < "GPU-3" else "n2", MEMORY, "XID 79" if uuid in out else "")
            for uuid in UUIDS
        }

    @rule(
        holder=holders,
        wanted=parts,
        generation=generations,
        unavailable=st.sets(st.sampled_from(UUIDS), max_size=2),
    )
    def acquire(self, holder: str, wanted: list[GpuPart], generation: int, unavailable: set[str]) -> None:
        before = dict(self.table.leases)
        response = self.table.acquire(
            holder, wanted, self.capacities(unavailable), generation=generation, now_s=self.now_s
        )
        assert response.reason
        if response.outcome is LeaseOutcome.GRANTED:
            assert response.lease is not None
            assert list(response.lease.parts) == wanted, "all or nothing"
            assert not unavailable & set(response.lease.gpu_uuids)
            assert {uuid < "GPU-3" for uuid in response.lease.gpu_uuids} in ({True}, {False}), "one node"
            self.granted[holder] = response.lease
        elif response.outcome is LeaseOutcome.UNCHANGED:
            assert response.lease is not None
            assert response.lease.parts == before[holder].parts
        else:
            assert dict(self.table.leases) == before

    @rule(holder=holders, generation=generations)
    def release(self, holder: str, generation: int) -> None:
        before = dict(self.table.leases)
        if self.table.release(holder, generation=generation).outcome is LeaseOutcome.GRANTED:
            self.granted.pop(holder, None)
        else:
            assert dict(self.table.leases) == before
        assert self.table.release(holder, generation=generation).outcome is LeaseOutcome.UNKNOWN

    @rule(holder=holders)
    def renew(self, holder: str) -> None:
        assert self.table.renew(holder, self.now_s) == (holder in self.table.leases)
        if holder in self.table.leases:
            assert self.table.leases[holder].renewed_s >= self.now_s

    @rule()
    def changes_are_taken_in(self) -> None:
        changed = self.table.changed_since(self.seen_version)
        assert changed is not None
        for holder in changed:
            lease = self.table.leases.get(holder)
            if lease is None:
                self.seen.pop(holder, None)
            else:
                self.seen[holder] = lease.parts
        self.seen_version = self.table.version
        assert self.seen == {holder: lease.parts for holder, lease in self.table.leases.items()}

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        for expired in self.table.reap(now_s=self.now_s, ttl_s=30):
            assert self.now_s - expired.renewed_s > 30
            self.granted.pop(expired.holder, None)

    @rule()
    def controller_restarts(self) -> None:
        """Every holder reports to the new controller, which then knows what the old one knew."""
        before = {holder: lease.parts for holder, lease in self.table.leases.items()}
        self.table = LeaseTable()
        self.table.restore(self.granted.values())
        self.seen_version, self.seen = 0, {}
        assert {holder: lease.parts for holder, lease in self.table.leases.items()} == before

    @invariant()
    def no_gpu_is_over_committed(self) -> None:
        for uuid in UUIDS:
            held = [p for lease in self.table.leases.values() for p in lease.parts if p.gpu_uuid == uuid]
            assert sum(part.milli for part in held) <= WHOLE_MILLI
            assert sum(part.memory_bytes for part in held) <= MEMORY
            assert len(held) == len(self.table.holders(uuid))
            assert self.table.used(uuid) == (
                sum(part.milli for part in held),
                sum(part.memory_bytes for part in held),
            )

    @invariant()
    def each_node_lists_its_own(self) -> None:
        for node_id in ("n1", "n2", "n3"):
            here = [lease for lease in self.table.leases.values() if lease.node_id == node_id]
            assert list(self.table.on_node(node_id)) == here

    @invariant()
    def holders_and_book_agree(self) -> None:
        assert {holder: lease.parts for holder, lease in self.granted.items()} == {
            holder: lease.parts for holder, lease in self.table.leases.items()
        }


Leasing.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeasing = Leasing.TestCase
