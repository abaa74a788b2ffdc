"""From what a node's agent measured to the node that the placement sees."""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.telemetry.samples import (
    GpuCondition,
    GpuInfo,
    GpuSample,
    Missing,
    NodeSample,
    Reading,
    T,
)


def node_of(
    sample: NodeSample,
    *,
    cpu_milli: int,
    memory_bytes: int,
    unavailable: str = "",
    cordoned: Mapping[str, str] | None = None,
) -> Node:
    """The node of ``sample``. CPUs and memory are what gangs may take there, not what the machine has;
    ``cordoned`` are GPUs that must not be used, by UUID, with the reason."""
    behind_switch = frozenset(gpu.info.uuid for gpu in sample.gpus if _switched(gpu.info))
    return Node(
        sample.node_id,
        tuple(_gpu(gpu, behind_switch, (cordoned or {}).get(gpu.info.uuid, "")) for gpu in sample.gpus),
        cpu_milli,
        memory_bytes,
        unavailable,
    )


def _gpu(sample: GpuSample, behind_switch: frozenset[str], cordoned: str) -> Gpu:
    info = sample.info
    links = _value(info.nvlinks, ())
    peers = frozenset(link.remote_uuid for link in links if link.active and link.remote_uuid)
    if info.uuid in behind_switch:
        # An NVSwitch connects all that hang on it.
        peers |= behind_switch - {info.uuid}
    problem = cordoned
    if not problem and sample.condition is not GpuCondition.OK:
        problem = f"{sample.condition.value.replace('_', ' ')}: {sample.detail}".rstrip(": ")
    if not problem and _value(info.mig_enabled, False):
        problem = "in MIG mode: gangs take whole GPUs or shares of one, not MIG instances"
    numa = _value(info.numa_node, -1)
    return Gpu(
        info.uuid,
        info.index,
        model=_value(info.name, ""),
        memory_bytes=_value(sample.memory_total_bytes, 0),
        nvlink_peers=peers,
        numa_node=numa if numa >= 0 else None,
        unavailable=problem,
    )


def _switched(info: GpuInfo) -> bool:
    return any(link.active and link.to_switch for link in _value(info.nvlinks, ()))


def _value(reading: Reading[T], otherwise: T) -> T:
    return otherwise if isinstance(reading, Missing) else reading
