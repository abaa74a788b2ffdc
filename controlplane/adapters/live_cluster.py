"""The cluster that runs: its nodes from Ray, their GPUs from the node agents where those run.

Where no agent answers, a node's GPUs are as many as Ray counts, without links: plans are then right about
numbers, not about NVLink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from controlplane.adapters.catalog import gpu_table
from controlplane.adapters.ray_node_agent import NAME_PREFIX
from controlplane.core.gpus import find_gpu
from controlplane.core.inventory import node_of
from controlplane.core.samples import NodeSample
from controlplane.core.topology import Gpu, Node

ASK_TIMEOUT_S = 5.0
_ACCELERATOR = "accelerator_type:"


def live_nodes(namespace: str) -> tuple[Node, ...]:
    """Nodes of the Ray that this process is connected to, those that are gone left out."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return tuple(_node(node, _sample(str(node["NodeID"]), namespace)) for node in alive)


def _sample(node_id: str, namespace: str) -> NodeSample | None:
    try:
        agent: Any = ray.get_actor(NAME_PREFIX + node_id, namespace)
        sample: Any = ray.get(agent.latest.remote(), timeout=ASK_TIMEOUT_S)
    except (ValueError, GetTimeoutError, RayError):
        return None
    return sample if isinstance(sample, NodeSample) else None


def _node(ray_node: Mapping[str, Any], sample: NodeSample | None) -> Node:
    resources: Mapping[str, float] = ray_node["Resources"]
    cpu_milli = round(resources.get("CPU", 0) * 1000)
    memory_bytes = round(resources.get("memory", 0))
    name = f"{ray_node['NodeManagerHostname']}-{str(ray_node['NodeID'])[:8]}"
    if sample is not None and sample.gpus:
        node = node_of(sample, cpu_milli=cpu_milli, memory_bytes=memory_bytes)
        return replace(node, node_id=name, gpus=tuple(replace(g, model=_named(g.model)) for g in node.gpus))
    count = int(resources.get("GPU", 0))
    model = next((key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)), "")
    known = find_gpu(gpu_table(), model)
    size = known.usable_bytes if known else 0
    gpus = tuple(Gpu(f"{name}/gpu{i}", i, known.name if known else model, size) for i in range(count))
    return Node(name, gpus, cpu_milli, memory_bytes)


def _named(driver_name: str) -> str:
    """The table's name for what the driver calls a GPU."""
    known = find_gpu(gpu_table(), driver_name)
    return known.name if known else driver_name
