"""Describes the usage of a simulated cluster as text."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.simulation.results import ClusterResult, SimulationResult, TierResult


def placement_lines(result: SimulationResult) -> Iterator[str]:
    """A line each for the cluster, the GPU budget and every tier; none if neither nodes nor GPUs had a
    limit."""
    if result.cluster is not None:
        yield _cluster_text(result.cluster)
    if result.gpu_budget is not None and result.policy == "tierplane":
        yield f"the tiers share {result.gpu_budget:g} GPUs"
    if result.cluster is not None or result.gpu_budget is not None:
        for tier in result.tiers:
            yield f"  {tier.record.tier}: {'; '.join(_tier_parts(tier))}"


def _cluster_text(cluster: ClusterResult) -> str:
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)}"
    text = f"{nodes} with {cluster.gpus:g} usable GPUs, at most {cluster.most_gpus:g} in use at once"
    return text + (f"; node failures: {cluster.node_failures}" if cluster.node_failures else "")


def _tier_parts(tier: TierResult) -> Iterator[str]:
    placement = tier.placement
    yield f"replicas placed: {tier.starts}; most GPUs in use at once: {placement.most_gpus:g}"
    if placement.waited:
        longest, total = f"{placement.longest_wait_s:.0f} s", f"{placement.waited_s:.0f} s"
        yield f"replicas that waited for room: {placement.waited}, at most {longest}, {total} in total"
    if placement.waiting:
        yield f"still waiting at the end: {placement.waiting}"
    if tier.limited_decisions:
        yield f"decisions limited by the GPU budget: {tier.limited_decisions}"
