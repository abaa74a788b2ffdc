"""Which replica holds which GPU: exact UUIDs, whole GPUs or shares, never more than a GPU has.

Every request is answered with its outcome and the reason; a refused request changes nothing. After a restart
of the controller, the table is rebuilt from what the holders report (:meth:`LeaseTable.restore`). While there
is no controller, holders continue with the GPUs they have.

* A whole GPU is leased only if no other holder has a part of it. A share is a part of one GPU's compute (in
  thousandths) and of its memory.
* A lease lasts while its holder reports. It may be reaped ``ttl_s`` after the last report; until then no
  other holder gets its GPUs.
* Acquiring again with the same holder and generation returns the existing lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from types import MappingProxyType

from controlplane.core.placement.gangs import WHOLE_MILLI

MAX_CHANGES = 4096
"""Maximum number of changes remembered; a caller that missed more has to read all leases."""


@dataclass(frozen=True, slots=True)
class GpuPart:
    """A part of one GPU that is requested or held."""

    gpu_uuid: str
    milli: int = WHOLE_MILLI
    """Thousandths of the GPU's compute."""
    memory_bytes: int = 0
    """Memory reserved; 0 if memory is not accounted for."""


@dataclass(frozen=True, slots=True)
class GpuLease:
    """The GPUs that one holder has."""

    holder: str
    """The replica's endpoint id."""
    generation: int
    """Counts the replica's leases; a newer generation replaces an older one's lease."""
    node_id: str
    parts: tuple[GpuPart, ...]
    renewed_s: float
    """When the holder last reported."""

    @property
    def gpu_uuids(self) -> tuple[str, ...]:
        """In the order in which the holder uses them."""
        return tuple(part.gpu_uuid for part in self.parts)


@dataclass(frozen=True, slots=True)
class GpuCapacity:
    """What leases may use of a GPU."""

    gpu_uuid: str
    node_id: str
    memory_bytes: int
    """0 if unknown; then shares of this GPU are limited only by its compute."""
    unavailable: str = ""
    """Why no new lease on it is granted; existing leases stay."""


class LeaseOutcome(StrEnum):
    """The outcome of a request."""

    GRANTED = "granted"
    UNCHANGED = "unchanged"
    """The lease exists already."""
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """There is no such lease."""
    WAIT = "wait"
    """It can't be decided yet: repeat the request after ``retry_after_s``."""
    UNMANAGED = "unmanaged"
    """The node has no readable GPUs: the holder uses those that Ray assigned to it."""


@dataclass(frozen=True, slots=True)
class LeaseResponse:
    """The outcome of a request, and why."""

    outcome: LeaseOutcome
    reason: str
    lease: GpuLease | None = None
    retry_after_s: float = 0.0
    """With WAIT, and with a refusal that may be temporary: when to repeat the request."""


class LeaseTable:
    """All leases by holder, and which holders have a part of each GPU."""

    def __init__(self) -> None:
        self._leases: dict[str, GpuLease] = {}
        self._holders: dict[str, tuple[str, ...]] = {}
        """GPU UUID → the holders of parts of it."""
        self._used: dict[str, tuple[int, int]] = {}
        """GPU UUID → thousandths and bytes that are held."""
        self._on_node: dict[str, dict[str, None]] = {}
        """Node id → holders there, in the order of their leases."""
        self._version = 0
        self._changed: deque[str] = deque(maxlen=MAX_CHANGES)
        """The holder of each of the last versions' changes."""

    @property
    def version(self) -> int:
        """Increases whenever a lease is added or removed; not when one is renewed."""
        return self._version

    def changed_since(self, version: int) -> frozenset[str] | None:
        """Holders whose lease was added or removed after ``version``; None if that is more than is
        remembered."""
        count = self._version - version
        if not 0 <= count <= len(self._changed):
            return None
        return frozenset(islice(reversed(self._changed), count))

    def on_node(self, node_id: str) -> Iterator[GpuLease]:
        """The leases on one node, oldest first."""
        return (self._leases[holder] for holder in self._on_node.get(node_id, ()))

    @property
    def leases(self) -> Mapping[str, GpuLease]:
        """By holder."""
        return MappingProxyType(self._leases)

    def holders(self, gpu_uuid: str) -> tuple[str, ...]:
        """The holders of parts of the GPU, oldest lease first."""
        return self._holders.get(gpu_uuid, ())

    def used(self, gpu_uuid: str, *, without: str = "") -> tuple[int, int]:
        """Thousandths and bytes of a GPU that are held, except by the holder ``without``."""
        milli, memory_bytes = self._used.get(gpu_uuid, (0, 0))
        if without and without in self._leases:
            for part in self._leases[without].parts:
                if part.gpu_uuid == gpu_uuid:
                    milli -= part.milli
                    memory_bytes -= part.memory_bytes
        return milli, memory_bytes

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

        The parts must be on one node, on GPUs that are available. A repeated request of the same generation
        returns the existing lease, whatever ``parts`` says: its first response may have been lost. A newer
        generation replaces the lease of an older one; an older generation is refused.
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

    def renew(self, holder: str, now_s: float) -> bool:
        """The holder has reported; False if it has no lease."""
        held = self._leases.get(holder)
        if held is not None:
            self._renewed(held, now_s)
        return held is not None

    def release(self, holder: str, *, generation: int | None = None) -> LeaseResponse:
        """Ends the holder's lease of this ``generation``, or of any generation if it is None.

        UNKNOWN if there is no such lease, for example because it was released before or replaced by a newer
        generation's; then nothing changes.
        """
        held = self._leases.get(holder)
        if held is None or (generation is not None and held.generation != generation):
            return LeaseResponse(LeaseOutcome.UNKNOWN, f"{holder} has no such lease")
        self._drop(holder)
        return LeaseResponse(LeaseOutcome.GRANTED, f"{len(held.parts)} GPU(s) are free", held)

    def restore(self, claims: Iterable[GpuLease]) -> tuple[LeaseResponse, ...]:
        """Adds the leases that running holders claim, the least recently renewed first.

        The holder's process already runs on those GPUs, so neither health nor capacity is checked. A claim is
        refused only if it conflicts with an existing lease; the reason names the GPU's holder.
        """
        responses = []
        for claim in sorted(claims, key=lambda lease: (lease.renewed_s, lease.holder, lease.generation)):
            held = self._leases.get(claim.holder)
            if held is not None and held.generation >= claim.generation:
                same = held.generation == claim.generation
                outcome = LeaseOutcome.UNCHANGED if same else LeaseOutcome.REFUSED
                reason = "it is known already" if same else f"generation {held.generation} is newer"
                responses.append(LeaseResponse(outcome, reason, held))
                continue
            problem = _malformed(claim.parts) or self._overlap(claim.holder, claim.parts)
            if problem:
                responses.append(LeaseResponse(LeaseOutcome.REFUSED, problem))
                continue
            self._put(claim)
            responses.append(LeaseResponse(LeaseOutcome.GRANTED, "restored", claim))
        return tuple(responses)

    def reap(self, *, now_s: float, ttl_s: float) -> tuple[GpuLease, ...]:
        """Removes and returns the leases that were not renewed for ``ttl_s``."""
        expired = [lease for lease in self._leases.values() if now_s - lease.renewed_s > ttl_s]
        for lease in expired:
            self._drop(lease.holder)
        return tuple(expired)

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
                others = ", ".join(other for other in self.holders(part.gpu_uuid) if other != holder)
                return f"{milli} thousandths of {part.gpu_uuid} are held by {others}"
        return ""

    def _renewed(self, lease: GpuLease, now_s: float) -> GpuLease:
        if now_s <= lease.renewed_s:
            return lease
        renewed = self._leases[lease.holder] = replace(lease, renewed_s=now_s)
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
            self._holders[part.gpu_uuid] = (*self.holders(part.gpu_uuid), lease.holder)

    def _drop(self, holder: str) -> None:
        self._version += 1
        self._changed.append(holder)
        lease = self._leases.pop(holder)
        on_node = self._on_node[lease.node_id]
        del on_node[holder]
        if not on_node:
            del self._on_node[lease.node_id]
        for part in lease.parts:
            uuid = part.gpu_uuid
            milli, memory_bytes = self._used[uuid]
            self._used[uuid] = (milli - part.milli, memory_bytes - part.memory_bytes)
            left = tuple(other for other in self._holders[uuid] if other != holder)
            if left:
                self._holders[uuid] = left
            else:
                del self._holders[uuid], self._used[uuid]


def _malformed(parts: Sequence[GpuPart]) -> str:
    if not parts:
        return "no GPU was requested"
    if len({part.gpu_uuid for part in parts}) != len(parts):
        return "the same GPU was requested twice"
    for part in parts:
        if not 1 <= part.milli <= WHOLE_MILLI or part.memory_bytes < 0:
            share = f"{part.milli} thousandths and {part.memory_bytes} bytes"
            return f"{part.gpu_uuid}: {share} are not a valid share"
    return ""
