"""Every node as operators see it: CPUs, memory, disks, GPUs, and of when the figures are."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.core.gpus.inventory import GpuInventory
from controlplane.core.telemetry.samples import value_or
from controlplane.core.telemetry.series import Freshness


@dataclass(frozen=True, slots=True)
class DiskView:
    """One file system of a node."""

    path: str
    total_bytes: int
    free_bytes: int

    @property
    def used_ratio(self) -> float:
        """In [0, 1]; 1 for a file system without any space."""
        return 1.0 - self.free_bytes / self.total_bytes if self.total_bytes > 0 else 1.0


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. A figure is None if it is not known, or too old to be shown; ``age_s`` says how old they
    are."""

    node_id: str
    hostname: str
    freshness: Freshness
    age_s: float | None
    """Since its agent's last sample arrived; None before the first."""
    cordoned: str
    """Why an operator cordoned or drained it; empty if none did."""
    cpu_count: int | None
    cpu_ratio: float | None
    """Busy share of all CPUs, in [0, 1]."""
    load_1m: float | None
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    disks: tuple[DiskView, ...]
    """The file systems of the run folder, of temporary files and of models."""
    gpus: int

    @property
    def memory_used_ratio(self) -> float | None:
        """In [0, 1]; None if it is not known."""
        total, available = self.memory_total_bytes, self.memory_available_bytes
        return None if not total or available is None else 1.0 - available / total


def node_views(inventory: GpuInventory, *, now_s: float) -> tuple[NodeView, ...]:
    """All nodes whose agents have reported, by id."""
    views = []
    for node_id, node in sorted(inventory.nodes.items()):
        signals, sample, hold = node.signals(now_s), node.latest, inventory.holds.get(node_id)
        memory = signals.memory_available_bytes
        # Every figure comes from one sample, so the age of one is that of all.
        known = memory.freshness is not Freshness.MISSING and sample is not None
        views.append(
            NodeView(
                node_id=node_id,
                hostname=sample.hostname if sample is not None else "",
                freshness=memory.freshness,
                age_s=None if node.latest_s is None else max(0.0, now_s - node.latest_s),
                cordoned="" if hold is None else hold.reason or "by an operator",
                cpu_count=sample.cpu_count if sample is not None else None,
                cpu_ratio=signals.cpu_ratio.value,
                load_1m=signals.load_1m.value,
                memory_total_bytes=value_or(sample.memory_total_bytes, None) if sample is not None else None,
                memory_available_bytes=None if memory.value is None else int(memory.value),
                disks=tuple(
                    DiskView(disk.path, disk.total_bytes, disk.free_bytes)
                    for disk in (sample.disks if known and sample is not None else ())
                ),
                gpus=len(inventory.gpus_of(node_id)),
            )
        )
    return tuple(views)
