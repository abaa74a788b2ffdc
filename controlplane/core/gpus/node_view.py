"""Converts the sample of a node's agent to a node for the placement planner."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.telemetry.samples import GpuCondition, GpuInfo, GpuSample, NodeSample, value_or


def placement_node(
    sample: NodeSample,
    *,
    cpu_milli: int = 0,
    memory_bytes: int = 0,
    unavailable: str = "",
    unavailable_gpus: Mapping[str, str] | None = None,
) -> Node:
    """The node of ``sample``.

    ``cpu_milli`` and ``memory_bytes`` are what gangs may use, which may be less than the machine has.
    ``unavailable`` is why nothing may be placed on the node. ``unavailable_gpus`` maps UUIDs of GPUs that
    must not be used to the reason; a GPU with an empty reason may be used.
    """
    behind_switch = frozenset(gpu.info.uuid for gpu in sample.gpus if _is_behind_switch(gpu.info))
    reasons = unavailable_gpus or {}
    return Node(
        sample.node_id,
        tuple(_gpu(gpu, behind_switch, reasons.get(gpu.info.uuid, "")) for gpu in sample.gpus),
        cpu_milli,
        memory_bytes,
        unavailable,
    )


def _gpu(sample: GpuSample, behind_switch: frozenset[str], unavailable: str) -> Gpu:
    info = sample.info
    links = value_or(info.nvlinks, ())
    peers = frozenset(link.remote_uuid for link in links if link.active and link.remote_uuid)
    if info.uuid in behind_switch:
        # An NVSwitch connects all GPUs that are attached to it.
        peers |= behind_switch - {info.uuid}
    if not unavailable and sample.condition is not GpuCondition.OK:
        unavailable = f"{sample.condition.value.replace('_', ' ')}: {sample.detail}".rstrip(": ")
    if not unavailable and value_or(info.mig_enabled, False):
        unavailable = "in MIG mode: a gang uses whole GPUs or shares of one, not MIG instances"
    numa_node = value_or(info.numa_node, -1)
    return Gpu(
        info.uuid,
        info.index,
        model=value_or(info.name, ""),
        memory_bytes=value_or(sample.memory_total_bytes, 0),
        nvlink_peers=peers,
        numa_node=numa_node if numa_node >= 0 else None,
        unavailable=unavailable,
    )


def _is_behind_switch(info: GpuInfo) -> bool:
    return any(link.active and link.to_switch for link in value_or(info.nvlinks, ()))
