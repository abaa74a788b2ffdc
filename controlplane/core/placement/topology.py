"""GPUs and nodes as the placement planner sees them: NVLink connections, and the distance between GPUs.

An *island* is a set of GPUs that reach each other over NVLink, directly or through others of the set: the
connected components of the peer links. A GPU without links is an island of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Distance(IntEnum):
    """How far apart GPUs are; for several GPUs, the distance of the pair that is farthest apart."""

    SAME = 0
    ISLAND = 1
    """Linked by NVLink."""
    NUMA = 2
    """On one NUMA node: over PCIe, without crossing sockets."""
    NODE = 3
    """On one machine, across its sockets."""
    CLUSTER = 4
    """On different machines."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a node."""

    uuid: str
    index: int
    """The driver's index on the node."""
    model: str = ""
    memory_bytes: int = 0
    """Memory that engines may use; 0 if unknown, and then memory is not accounted for."""
    nvlink_peers: frozenset[str] = frozenset()
    """UUIDs of the GPUs to which it has an NVLink. A link that only one end reports counts for both."""
    numa_node: int | None = None
    unavailable: str = ""
    """Why it must not be used (unhealthy, cordoned, lost); empty if it may be used."""


@dataclass(frozen=True, slots=True)
class Node:
    """One machine: its GPUs, and the CPUs and memory that gangs may use."""

    node_id: str
    gpus: tuple[Gpu, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    unavailable: str = ""
    """Why nothing may be placed here (cordoned, draining, lost); empty if it may be used."""
    node_type: str = ""
    """The kind of machine, for reports and for ``--what-if add-node``."""


def islands(gpus: Sequence[Gpu]) -> tuple[tuple[int, ...], ...]:
    """The NVLink islands of one node as positions in ``gpus``, ascending inside an island; the islands are
    ordered by their first GPU. Peers that are not in ``gpus`` are ignored."""
    position = {gpu.uuid: i for i, gpu in enumerate(gpus)}
    root = list(range(len(gpus)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, gpu in enumerate(gpus):
        for peer in gpu.nvlink_peers:
            if peer in position:
                a, b = sorted((find(i), find(position[peer])))
                root[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(gpus)):
        groups.setdefault(find(i), []).append(i)
    return tuple(tuple(group) for _, group in sorted(groups.items()))


def numa_groups(gpus: Sequence[Gpu]) -> tuple[tuple[int, ...], ...]:
    """The GPUs of each NUMA node as positions in ``gpus``; the groups are ordered by their first GPU. GPUs
    without a reported NUMA node form one group."""
    groups: dict[int | None, list[int]] = {}
    for i, gpu in enumerate(gpus):
        groups.setdefault(gpu.numa_node, []).append(i)
    return tuple(sorted(tuple(group) for group in groups.values()))


def spread_of(node: Node, uuids: Iterable[str]) -> Distance:
    """The distance between these GPUs of ``node``. KeyError if one is not on the node."""
    position = {gpu.uuid: i for i, gpu in enumerate(node.gpus)}
    chosen = {position[uuid] for uuid in uuids}
    if len(chosen) <= 1:
        return Distance.SAME
    if any(chosen <= set(group) for group in islands(node.gpus)):
        return Distance.ISLAND
    if any(chosen <= set(group) for group in numa_groups(node.gpus)):
        return Distance.NUMA
    return Distance.NODE
