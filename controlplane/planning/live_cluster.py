"""Reads the running cluster: its nodes from Ray, their GPUs from the node agents, and the resources in use.

If a node's agent doesn't respond, the node gets as many GPUs as Ray counts, without links: plans then respect
the number of GPUs but ignore NVLink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util import placement_group_table

from controlplane.config import PlaneConfig
from controlplane.controller.api import ControllerApi
from controlplane.controller.handle import find_controller
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.gpus.node_view import placement_node
from controlplane.core.gpus.views import GpuView
from controlplane.core.placement.occupancy import ReservedResources, RunningReplica
from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.sizing.gpu_models import find_gpu
from controlplane.core.telemetry.samples import Missing, NodeSample
from controlplane.models.catalog import gpu_table
from controlplane.node_agent.ray_actor import NAME_PREFIX
from controlplane.ray_cluster import plane

CALL_TIMEOUT_S = 5.0
_ACCELERATOR = "accelerator_type:"
_WITH_GPUS = frozenset(
    {EndpointState.STARTING, EndpointState.READY, EndpointState.RESTARTING, EndpointState.DRAINING}
)
"""States in which a replica occupies its GPUs."""


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """Nodes, under readable names, and the resources in use."""

    nodes: tuple[Node, ...]
    replicas: tuple[RunningReplica, ...] = ()
    reserved: Mapping[str, ReservedResources] | None = None
    """By node; None if Ray doesn't report it."""
    notes: tuple[str, ...] = ()


def live_cluster(config: PlaneConfig) -> LiveCluster:
    """The Ray cluster to which this process is connected, with the replicas of the plane in the
    configuration's namespace.

    Blocks for a few calls to Ray and one to each node's agent.
    """
    namespace = config.controller.namespace
    rows = _alive()
    samples = {str(row["NodeID"]): _sample(str(row["NodeID"]), namespace) for row in rows}
    out_of_use = _out_of_use(namespace)
    nodes = {
        node_id: _node(row, samples[node_id], out_of_use) for row in rows if (node_id := str(row["NodeID"]))
    }
    names = {node_id: node.node_id for node_id, node in nodes.items()}
    notes: list[str] = []
    reserved = _reserved(rows, names, samples, out_of_use)
    if reserved is None:
        notes.append("Ray doesn't report reservations: other programs are not counted")
    view = plane.view(namespace)
    if view is None:
        notes.append(f"no plane responds in namespace {namespace}: its replicas are not counted")
    endpoints = view.snapshot.endpoints if view else ()
    return LiveCluster(tuple(nodes.values()), _replicas(endpoints, config, names), reserved, tuple(notes))


@dataclass(frozen=True, slots=True)
class _OutOfUse:
    """Nodes and GPUs that are out of use, with the reasons; nodes by Ray's id."""

    nodes: Mapping[str, str]
    gpus: Mapping[str, str]
    gpus_by_node: Mapping[str, int]
    """Number of GPUs out of use per node. For each of them tierplane reserves one GPU in Ray, so that Ray
    puts nothing else there."""


def _out_of_use(namespace: str) -> _OutOfUse:
    controller = find_controller(namespace)
    views: tuple[GpuView, ...] = ()
    if controller is not None:
        try:
            views = controller.get(CALL_TIMEOUT_S, ControllerApi.gpus)
        except (GetTimeoutError, RayError, AttributeError):
            # The controller is busy, or of an older version.
            views = ()
    cordoned = [view for view in views if view.cordoned]
    by_node: dict[str, int] = {}
    for view in cordoned:
        by_node[view.node_id] = by_node.get(view.node_id, 0) + 1
    return _OutOfUse(
        {view.node_id: view.reason or "cordoned" for view in cordoned if view.node_cordoned},
        {
            view.uuid: f"{view.state}: {view.reason}".rstrip(": ")
            for view in cordoned
            if not view.node_cordoned
        },
        by_node,
    )


def _alive() -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [row for row in rows if row["Alive"]]


def _replicas(
    endpoints: Sequence[Endpoint], config: PlaneConfig, names: Mapping[str, str]
) -> tuple[RunningReplica, ...]:
    wide = {tier.name: tier.world_size for tier in config.tiers if tier.pipeline_across_nodes}
    groups = _gpu_groups(names) if wide else []
    found = []
    for endpoint in endpoints:
        if endpoint.state not in _WITH_GPUS or endpoint.engine == "endpoint":
            continue
        group: tuple[tuple[str, int], ...] = ()
        if endpoint.tier in wide:
            gpus = wide[endpoint.tier]
            group = next((each for each in groups if sum(count for _, count in each) == gpus), ())
            if group:
                groups.remove(group)
        found.append(
            RunningReplica(
                endpoint.endpoint_id,
                endpoint.tier,
                names.get(endpoint.node_id, endpoint.node_id),
                endpoint.gpu_uuids,
                group,
                leaving=endpoint.state is EndpointState.DRAINING,
            )
        )
    return tuple(found)


def _gpu_groups(names: Mapping[str, str]) -> list[tuple[tuple[str, int], ...]]:
    """The (node, GPUs) pairs of each placement group with GPUs. Every engine on several nodes has such a
    group."""
    table: Mapping[str, Mapping[str, Any]] = placement_group_table()
    groups = []
    for group in table.values():
        gpus: dict[str, int] = {}
        for number, bundle in group["bundles"].items():
            node_id = group["bundles_to_node_id"].get(number, "")
            if bundle.get("GPU") and node_id:
                name = names.get(node_id, node_id)
                gpus[name] = gpus.get(name, 0) + int(bundle["GPU"])
        if group["state"] == "CREATED" and gpus:
            groups.append(tuple(sorted(gpus.items())))
    return groups


def _reserved(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    samples: Mapping[str, NodeSample | None],
    out_of_use: _OutOfUse,
) -> dict[str, ReservedResources] | None:
    """The reserved resources of each node, without GPUs that are reserved because they are out of use.

    Ray has no public call for this; None if its version lacks the private one.
    """
    try:
        from ray._private.state import available_resources_per_node
    except ImportError:
        return None
    available: Mapping[str, Mapping[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    found = {}
    for row in rows:
        node_id = str(row["NodeID"])
        left = available.get(node_id, {})
        gpu_milli = _taken_milli("GPU", row["Resources"], left) - 1000 * out_of_use.gpus_by_node.get(
            node_id, 0
        )
        found[names[node_id]] = ReservedResources(
            max(0, gpu_milli), _taken_milli("CPU", row["Resources"], left), _used_bytes(samples[node_id])
        )
    return found


def _taken_milli(name: str, total: Mapping[str, float], left: Mapping[str, float]) -> int:
    return max(0, round((total.get(name, 0.0) - left.get(name, 0.0)) * 1000))


def _used_bytes(sample: NodeSample | None) -> int:
    if sample is None or isinstance(sample.memory_available_bytes, Missing):
        return 0
    if isinstance(sample.memory_total_bytes, Missing):
        return 0
    return max(0, int(sample.memory_total_bytes - sample.memory_available_bytes))


def _sample(node_id: str, namespace: str) -> NodeSample | None:
    try:
        agent: Any = ray.get_actor(NAME_PREFIX + node_id, namespace)
        sample: Any = ray.get(agent.latest.remote(), timeout=CALL_TIMEOUT_S)
    except (ValueError, GetTimeoutError, RayError):
        return None
    return sample if isinstance(sample, NodeSample) else None


def _node(row: Mapping[str, Any], sample: NodeSample | None, out_of_use: _OutOfUse) -> Node:
    resources: Mapping[str, float] = row["Resources"]
    cpu_milli = round(resources.get("CPU", 0) * 1000)
    memory_bytes = round(resources.get("memory", 0))
    if sample is not None and not isinstance(sample.memory_total_bytes, Missing):
        # Ray reserves a part of the memory for objects; tierplane stores none.
        memory_bytes = sample.memory_total_bytes
    name = f"{row['NodeManagerHostname']}-{str(row['NodeID'])[:8]}"
    unavailable = out_of_use.nodes.get(str(row["NodeID"]), "")
    if sample is not None and sample.gpus:
        node = placement_node(
            sample,
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            unavailable=unavailable,
            unavailable_gpus=out_of_use.gpus,
        )
        return replace(node, node_id=name, gpus=tuple(replace(g, model=_named(g.model)) for g in node.gpus))
    count = int(resources.get("GPU", 0))
    model = next((key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)), "")
    known = find_gpu(gpu_table(), model)
    size = known.usable_bytes if known else 0
    gpus = tuple(Gpu(f"{name}/gpu{i}", i, known.name if known else model, size) for i in range(count))
    return Node(name, gpus, cpu_milli, memory_bytes, unavailable)


def _named(driver_name: str) -> str:
    """The table's name for a GPU, given the driver's name; the driver's name if the table lacks it."""
    known = find_gpu(gpu_table(), driver_name)
    return known.name if known else driver_name
