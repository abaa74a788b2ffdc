"""Who holds which GPU: exact UUIDs, whole or in shares, never more than there is.

Every request is answered with what became of it and why; one that is refused changes nothing. After a
controller starts anew the book is rebuilt from what holders say they hold (:meth:`LeaseBook.restore`), and
a holder without a controller goes on with what it has.

* A whole lease takes GPUs that nobody else has a part of; a share takes a part of one GPU's compute (in
  thousandths) and of its memory.
* A lease lasts as long as its holder is heard of: ``ttl_s`` after the last renewal it may be reaped, and
  until then its GPUs are not given away.
* Acquiring again under the same holder and generation answers with the lease that is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from types import MappingProxyType

WHOLE_MILLI = 1000
"""All of a GPU's compute."""
CHANGES_KEPT = 4096
"""Whoever asks more seldom than that for what changed has to look at all leases."""


@dataclass(frozen=True, slots=True)
class GpuPart:
    """What of one GPU is asked for or held."""

    gpu_uuid: str
    milli: int = WHOLE_MILLI
    memory_bytes: int = 0
    """Memory set aside."""


@dataclass(frozen=True, slots=True)
class GpuLease:
    """What one holder has."""

    holder: str
    """The endpoint's id."""
    generation: int
    """Of the holder's life; a newer one replaces an older one's lease."""
    node_id: str
    parts: tuple[GpuPart, ...]
    renewed_s: float

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """In the order in which the holder uses them."""
        return tuple(part.gpu_uuid for part in self.parts)


@dataclass(frozen=True, slots=True)
class GpuCapacity:
    """What a GPU has to give."""

    gpu_uuid: str
    node_id: str
    memory_bytes: int
    """0: not known; then shares of it are limited by compute only."""
    unavailable: str = ""
    """Why nothing new may be leased on it; what is held stays held."""


class LeaseOutcome(StrEnum):
    """What became of a request."""

    GRANTED = "granted"
    UNCHANGED = "unchanged"
    """It is already so."""
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """There is no such lease."""
    WAIT = "wait"
    """It can't be told yet: ask again after ``retry_after_s``."""
    UNMANAGED = "unmanaged"
    """The node has no GPUs that can be read: the holder uses what Ray gave it."""


@dataclass(frozen=True, slots=True)
class LeaseResponse:
    """What became of a request, and why."""

    outcome: LeaseOutcome
    reason: str
    lease: GpuLease | None = None
    retry_after_s: float = 0.0
    """With WAIT, and with a refusal that need not last."""


class LeaseBook:
    """Every lease, by holder, and who has a part of each GPU."""

    def __init__(self) -> None:
        self._leases: dict[str, GpuLease] = {}
        self._users: dict[str, tuple[str, ...]] = {}
        self._used: dict[str, tuple[int, int]] = {}
        """GPU UUID → thousandths and bytes that are held."""
        self._on_node: dict[str, dict[str, None]] = {}
        """Node id → holders there, in the order in which they came."""
        self._version = 0
        self._changed: deque[str] = deque(maxlen=CHANGES_KEPT)
        """The holder of each version's change, the last ones."""

    @property
    def version(self) -> int:
        """Grows whenever a lease comes or goes; not when one is renewed."""
        return self._version

    def changed_since(self, version: int) -> frozenset[str] | None:
        """Holders whose lease came or went after ``version``; None if that is too long ago to tell."""
        count = self._version - version
        if not 0 <= count <= len(self._changed):
            return None
        return frozenset(islice(reversed(self._changed), count))

    def on_node(self, node_id: str) -> Iterator[GpuLease]:
        """The leases of one node, in the order in which they came."""
        return (self._leases[holder] for holder in self._on_node.get(node_id, ()))

    @property
    def leases(self) -> Mapping[str, GpuLease]:
        """By holder."""
        return MappingProxyType(self._leases)

    def holders(self, gpu_uuid: str) -> tuple[str, ...]:
        """Who has a part of the GPU, in the order in which they came."""
        return self._users.get(gpu_uuid, ())

    def used(self, gpu_uuid: str, *, without: str = "") -> tuple[int, int]:
        """Thousandths and bytes of a GPU that are held, ``without`` those of one holder."""
        milli, memory_bytes = self._used.get(gpu_uuid, (0, 0))
        if without and without in self._leases:
            for part in self._leases[without].parts:
                if part.gpu_uuid == gpu_uuid:
                    milli -= part.milli
                    memory_bytes -= part.memory_bytes
        return milli, memory_bytes

    def free(self, capacity: GpuCapacity) -> tuple[int, int | None]:
        """Thousandths and bytes of a GPU that may still be leased; bytes are None where they aren't known."""
        if capacity.unavailable:
            return 0, 0
        milli, memory_bytes = self.used(capacity.gpu_uuid)
        left = max(0, WHOLE_MILLI - milli)
        if not left:
            return 0, 0
        return left, max(0, capacity.memory_bytes - memory_bytes) if capacity.memory_bytes else None

    def acquire(
        self,
        holder: str,
        parts: Sequence[GpuPart],
        capacities: Mapping[str, GpuCapacity],
        *,
        generation: int,
        now_s: float,
    ) -> LeaseResponse:
        """Gives ``holder`` all of ``parts`` or nothing.

        The parts must be on one node, on GPUs that are available. Asked again by the same generation it
        answers with the lease that is there, whatever ``parts`` says (an answer that was lost is asked for
        again); a newer generation gives up what the older one had; an older one is refused.
        """
        held = self._leases.get(holder)
        if held is not None and held.generation == generation:
            return LeaseResponse(
                LeaseOutcome.UNCHANGED, "it holds this lease already", self._renewed(held, now_s)
            )
        if held is not None and held.generation > generation:
            reason = f"generation {held.generation} of {holder} holds a lease, {generation} is older"
            return LeaseResponse(LeaseOutcome.REFUSED, reason)
        problem = _malformed(parts) or self._unavailable(holder, parts, capacities)
        problem = problem or self._overlap(holder, parts)
        if problem:
            return LeaseResponse(LeaseOutcome.REFUSED, problem)
        lease = GpuLease(holder, generation, capacities[parts[0].gpu_uuid].node_id, tuple(parts), now_s)
        self._put(lease)
        return LeaseResponse(LeaseOutcome.GRANTED, f"{len(lease.parts)} GPU(s)", lease)

    def renew(self, holder: str, *, generation: int, now_s: float) -> LeaseResponse:
        """The holder is alive. UNKNOWN if it has no lease of that generation: it should claim it."""
        held = self._leases.get(holder)
        if held is None or held.generation != generation:
            return LeaseResponse(LeaseOutcome.UNKNOWN, f"{holder} has no lease of generation {generation}")
        return LeaseResponse(LeaseOutcome.UNCHANGED, "renewed", self._renewed(held, now_s))

    def heard(self, holder: str, now_s: float) -> bool:
        """The holder is alive, whatever its generation; False if it has no lease."""
        held = self._leases.get(holder)
        if held is not None:
            self._renewed(held, now_s)
        return held is not None

    def release(self, holder: str, *, generation: int | None = None) -> LeaseResponse:
        """Gives back what the holder has. A late release of an older generation changes nothing; releasing
        twice is UNKNOWN and changes nothing. Without ``generation``: whatever it holds."""
        held = self._leases.get(holder)
        if held is None or (generation is not None and held.generation != generation):
            return LeaseResponse(LeaseOutcome.UNKNOWN, f"{holder} has no such lease")
        self._drop(holder)
        return LeaseResponse(LeaseOutcome.GRANTED, f"{len(held.parts)} GPU(s) are free", held)

    def restore(self, claims: Iterable[GpuLease]) -> tuple[LeaseResponse, ...]:
        """Takes in what running holders say they hold, the longest unheard of first.

        A claim is a fact (its process runs there), so health and capacity don't refuse it; only a conflict
        with another claim does: whoever is in the book keeps the GPU, and the other answer says who has it.
        """
        answers = []
        for claim in sorted(claims, key=lambda lease: (lease.renewed_s, lease.holder, lease.generation)):
            held = self._leases.get(claim.holder)
            if held is not None and held.generation >= claim.generation:
                same = held.generation == claim.generation
                reason = "it is known already" if same else f"generation {held.generation} is newer"
                answers.append(
                    LeaseResponse(LeaseOutcome.UNCHANGED if same else LeaseOutcome.REFUSED, reason, held)
                )
                continue
            problem = _malformed(claim.parts) or self._overlap(claim.holder, claim.parts)
            if problem:
                answers.append(LeaseResponse(LeaseOutcome.REFUSED, problem))
                continue
            self._put(claim)
            answers.append(LeaseResponse(LeaseOutcome.GRANTED, "restored", claim))
        return tuple(answers)

    def reap(self, *, now_s: float, ttl_s: float) -> tuple[GpuLease, ...]:
        """Frees what was not renewed for ``ttl_s``; answers with the leases that died."""
        dead = [lease for lease in self._leases.values() if now_s - lease.renewed_s > ttl_s]
        for lease in dead:
            self._drop(lease.holder)
        return tuple(dead)

    def _unavailable(
        self, holder: str, parts: Sequence[GpuPart], capacities: Mapping[str, GpuCapacity]
    ) -> str:
        for part in parts:
            capacity = capacities.get(part.gpu_uuid)
            if capacity is None:
                return f"{part.gpu_uuid} is not known"
            if capacity.unavailable:
                return f"{part.gpu_uuid} is not available: {capacity.unavailable}"
            memory_bytes = self.used(part.gpu_uuid, without=holder)[1] + part.memory_bytes
            if capacity.memory_bytes and memory_bytes > capacity.memory_bytes:
                return f"{part.gpu_uuid} has {capacity.memory_bytes} bytes, {memory_bytes} would be held"
        nodes = {capacities[part.gpu_uuid].node_id for part in parts}
        return f"the GPUs are on several nodes: {', '.join(sorted(nodes))}" if len(nodes) > 1 else ""

    def _overlap(self, holder: str, parts: Sequence[GpuPart]) -> str:
        for part in parts:
            milli, _ = self.used(part.gpu_uuid, without=holder)
            if milli + part.milli > WHOLE_MILLI:
                others = ", ".join(user for user in self.holders(part.gpu_uuid) if user != holder)
                return f"{milli} thousandths of {part.gpu_uuid} are held by {others}"
        return ""

    def _renewed(self, lease: GpuLease, now_s: float) -> GpuLease:
        if now_s <= lease.renewed_s:
            return lease
        renewed = GpuLease(lease.holder, lease.generation, lease.node_id, lease.parts, now_s)
        self._leases[lease.holder] = renewed
        return renewed

    def _put(self, lease: GpuLease) -> None:
        if lease.holder in self._leases:
            self._drop(lease.holder)
        self._version += 1
        self._changed.append(lease.holder)
        self._leases[lease.holder] = lease
        self._on_node.setdefault(lease.node_id, {})[lease.holder] = None
        for part in lease.parts:
            milli, memory_bytes = self.used(part.gpu_uuid)
            self._used[part.gpu_uuid] = (milli + part.milli, memory_bytes + part.memory_bytes)
            self._users[part.gpu_uuid] = (*self.holders(part.gpu_uuid), lease.holder)

    def _drop(self, holder: str) -> None:
        self._version += 1
        self._changed.append(holder)
        lease = self._leases.pop(holder)
        here = self._on_node[lease.node_id]
        del here[holder]
        if not here:
            del self._on_node[lease.node_id]
        for part in lease.parts:
            uuid = part.gpu_uuid
            milli, memory_bytes = self._used[uuid]
            self._used[uuid] = (milli - part.milli, memory_bytes - part.memory_bytes)
            left = tuple(user for user in self._users[uuid] if user != holder)
            if left:
                self._users[uuid] = left
            else:
                del self._users[uuid], self._used[uuid]


def _malformed(parts: Sequence[GpuPart]) -> str:
    if not parts:
        return "no GPU was asked for"
    if len({part.gpu_uuid for part in parts}) != len(parts):
        return "the same GPU was asked for twice"
    for part in parts:
        if not 1 <= part.milli <= WHOLE_MILLI or part.memory_bytes < 0:
            return f"{part.gpu_uuid}: {part.milli} thousandths and {part.memory_bytes} bytes are no share"
    return ""
