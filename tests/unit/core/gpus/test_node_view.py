"""Nodes from what their agents measured."""

from __future__ import annotations

from typing import Any

from controlplane.core.gpus.node_view import placement_node
from controlplane.core.placement.topology import islands
from controlplane.core.telemetry.samples import (
    NOT_SAMPLED,
    GpuCondition,
    GpuInfo,
    GpuSample,
    NodeSample,
    NvLink,
)
from tests.support.samples import node_sample


def link(remote: str = "", *, active: bool = True, switch: bool = False) -> NvLink:
    return NvLink(active, remote, switch)


def gpu(name: str, *links: NvLink, **fields: Any) -> GpuSample:
    info = GpuInfo(name, int(name[1:]), "NVIDIA A", numa_node=0, nvlinks=links)
    return GpuSample(info, GpuCondition.OK, memory_total_bytes=1000, **fields)


def sample(*gpus: GpuSample) -> NodeSample:
    return node_sample("n", 1, 0.0, gpus)


def test_links_make_islands() -> None:
    pairs = placement_node(
        sample(gpu("g0", link("g1")), gpu("g1"), gpu("g2", link("g3", active=False)), gpu("g3")),
        cpu_milli=1000,
        memory_bytes=5,
    )
    assert islands(pairs.gpus) == ((0, 1), (2,), (3,))
    assert (pairs.node_id, pairs.cpu_milli, pairs.memory_bytes) == ("n", 1000, 5)
    switched = placement_node(
        sample(gpu("g0", link(switch=True)), gpu("g1", link(switch=True)), gpu("g2")),
        cpu_milli=0,
        memory_bytes=0,
    )
    assert islands(switched.gpus) == ((0, 1), (2,))


def test_what_must_not_be_used_says_why() -> None:
    lost = GpuSample(GpuInfo("g0", 0), GpuCondition.LOST, "fell off the bus")
    mig = GpuSample(GpuInfo("g1", 1, mig_enabled=True), GpuCondition.OK)
    bare = GpuSample(GpuInfo("g2", 2), GpuCondition.RESET_REQUIRED)
    node = placement_node(
        sample(lost, mig, bare, gpu("g3")),
        cpu_milli=0,
        memory_bytes=0,
        unavailable="draining",
        unavailable_gpus={"g3": "XID 48"},
    )
    assert node.unavailable == "draining"
    assert [g.unavailable.split(":")[0] for g in node.gpus] == [
        "lost",
        "in MIG mode",
        "reset required",
        "XID 48",
    ]
    assert node.gpus[0].unavailable == "lost: fell off the bus"


def test_missing_readings_are_not_guessed() -> None:
    unknown = GpuSample(GpuInfo("g0", 0, numa_node=NOT_SAMPLED), GpuCondition.OK)
    found = placement_node(sample(unknown), cpu_milli=0, memory_bytes=0).gpus[0]
    assert (found.model, found.memory_bytes, found.numa_node, found.nvlink_peers) == (
        "",
        0,
        None,
        frozenset(),
    )
