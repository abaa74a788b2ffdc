"""Nodes with GPUs for tests of placement."""

from __future__ import annotations

from controlplane.core.placement.topology import Gpu, Node

GIB = 1024**3


def make_node(
    name: str,
    gpus: int = 8,
    island: int = 0,
    *,
    model: str = "A",
    memory_gib: int = 80,
    cpus: int = 64,
    host_gib: int = 512,
    sockets: int = 2,
) -> Node:
    """GPUs in islands of ``island`` (0: no links), half of them on each socket."""

    def peers(i: int) -> frozenset[str]:
        if not island:
            return frozenset()
        first = i - i % island
        return frozenset(f"{name}/{j}" for j in range(first, min(first + island, gpus)) if j != i)

    return Node(
        name,
        tuple(
            Gpu(f"{name}/{i}", i, model, memory_gib * GIB, peers(i), i * sockets // gpus) for i in range(gpus)
        ),
        cpus * 1000,
        host_gib * GIB,
    )


def plain_node(name: str, gpus: int, model: str = "L4") -> Node:
    """One whose GPUs have no links, and with CPUs and memory for any gang of a test."""
    return Node(name, tuple(Gpu(f"{name}/{i}", i, model) for i in range(gpus)), 64_000, 1 << 40)
