"""What a simulated fleet had room for, in words."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.simulation.results import ClusterResult, SimulationResult, TierResult


def room_lines(result: SimulationResult) -> Iterator[str]:
    """Cluster, budget, and a line for each tier; nothing where nobody counted and there always was room."""
    if result.cluster is not None:
        yield _machines(result.cluster)
    if result.gpu_budget is not None and result.policy == "tierplane":
        yield f"the tiers share {result.gpu_budget:g} GPUs"
    if result.cluster is not None or result.gpu_budget is not None:
        for tier in result.tiers:
            yield f"  {tier.record.tier}: {'; '.join(_fared(tier))}"


def _machines(cluster: ClusterResult) -> str:
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)}"
    text = f"{nodes} with {cluster.gpus:g} GPUs in use, {cluster.most_gpus:g} held at most"
    return text + (f"; node failures: {cluster.node_failures}" if cluster.node_failures else "")


def _fared(tier: TierResult) -> Iterator[str]:
    room = tier.room
    yield f"replicas placed: {tier.starts}; GPUs held at most: {room.most_gpus:g}"
    if room.waited:
        longest, together = f"{room.longest_wait_s:.0f} s", f"{room.waited_s:.0f} s"
        yield f"waited for room: {room.waited}, {longest} at most and {together} in all"
    if room.waiting:
        yield f"still waiting at the end: {room.waiting}"
    if tier.short_rounds:
        yield f"decisions that the budget cut: {tier.short_rounds}"
