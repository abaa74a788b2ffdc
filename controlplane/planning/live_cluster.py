"""The cluster that runs: its nodes from Ray, their GPUs from the node agents where those run, and who has
what of them.

Where no agent answers, a node's GPUs are as many as Ray counts, without links: plans are then right about
numbers, not about NVLink.
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
from controlplane.core.gpus.node_view import node_of
from controlplane.core.gpus.views import GpuView
from controlplane.core.placement.occupancy import ReservedResources, RunningReplica
from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.sizing.gpu_models import find_gpu
from controlplane.core.telemetry.samples import Missing, NodeSample
from controlplane.models.catalog import gpu_table
from controlplane.node_agent.ray_actor import NAME_PREFIX
from controlplane.ray_cluster import plane

ASK_TIMEOUT_S = 5.0
_ACCELERATOR = "accelerator_type:"
_HOLDING = frozenset(
    {EndpointState.STARTING, EndpointState.READY, EndpointState.RESTARTING, EndpointState.DRAINING}
)
"""States in which a replica has its GPUs."""


@dataclass(frozen=True, slots=True)
class LiveCluster:
    """Nodes, by names that people can read, and who has what of them."""

    nodes: tuple[Node, ...]
    replicas: tuple[RunningReplica, ...] = ()
    reserved: Mapping[str, ReservedResources] | None = None
    """By node; None: Ray does not say."""
    notes: tuple[str, ...] = ()


def live_cluster(config: PlaneConfig) -> LiveCluster:
    """The Ray that this process is connected to, and the plane in the configuration's namespace.

    Blocks for a few calls to Ray and one to each node's agent.
    """
    namespace = config.controller.namespace
    rows = _alive()
    samples = {str(row["NodeID"]): _sample(str(row["NodeID"]), namespace) for row in rows}
    barred = _out_of_use(namespace)
    nodes = {node_id: _node(row, samples[node_id], barred) for row in rows if (node_id := str(row["NodeID"]))}
    names = {node_id: node.node_id for node_id, node in nodes.items()}
    notes: list[str] = []
    reserved = _reserved(rows, names, samples, barred)
    if reserved is None:
        notes.append("Ray does not say what is reserved: what others run is not counted")
    view = plane.view(namespace)
    if view is None:
        notes.append(f"no plane answers in namespace {namespace}: none of its replicas are counted")
    endpoints = view.snapshot.endpoints if view else ()
    return LiveCluster(tuple(nodes.values()), _replicas(endpoints, config, names), reserved, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Barred:
    """What the controller keeps out of use, with the reasons; nodes by Ray's id."""

    nodes: Mapping[str, str]
    gpus: Mapping[str, str]
    gpus_by_node: Mapping[str, int]
    """For each of these one GPU that Ray counts is held, so that nothing else is put there."""


def _out_of_use(namespace: str) -> _Barred:
    controller = find_controller(namespace)
    views: tuple[GpuView, ...] = ()
    if controller is not None:
        try:
            views = controller.get(ASK_TIMEOUT_S, ControllerApi.gpus)
        except (GetTimeoutError, RayError, AttributeError):
            # A controller that is busy, or older than this.
            views = ()
    barred = [view for view in views if view.cordoned]
    by_node: dict[str, int] = {}
    for view in barred:
        by_node[view.node_id] = by_node.get(view.node_id, 0) + 1
    return _Barred(
        {view.node_id: view.reason or "cordoned" for view in barred if view.node_cordoned},
        {view.uuid: f"{view.state}: {view.reason}".rstrip(": ") for view in barred if not view.node_cordoned},
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
        if endpoint.state not in _HOLDING or endpoint.engine == "endpoint":
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
    """GPUs by node of each placement group that has some: an engine on several nodes has one."""
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
    barred: _Barred,
) -> dict[str, ReservedResources] | None:
    """What is reserved of each node, but for GPUs that are held because they are out of use.

    Ray has no public call for it: None where the one it has is gone.
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
        gpu_milli = _taken_milli("GPU", row["Resources"], left) - 1000 * barred.gpus_by_node.get(node_id, 0)
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
        sample: Any = ray.get(agent.latest.remote(), timeout=ASK_TIMEOUT_S)
    except (ValueError, GetTimeoutError, RayError):
        return None
    return sample if isinstance(sample, NodeSample) else None


def _node(row: Mapping[str, Any], sample: NodeSample | None, barred: _Barred) -> Node:
    resources: Mapping[str, float] = row["Resources"]
    cpu_milli = round(resources.get("CPU", 0) * 1000)
    memory_bytes = round(resources.get("memory", 0))
    if sample is not None and not isinstance(sample.memory_total_bytes, Missing):
        # Ray sets a part of it aside for objects, of which tierplane has none.
        memory_bytes = sample.memory_total_bytes
    name = f"{row['NodeManagerHostname']}-{str(row['NodeID'])[:8]}"
    closed = barred.nodes.get(str(row["NodeID"]), "")
    if sample is not None and sample.gpus:
        node = node_of(
            sample,
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            unavailable=closed,
            cordoned=barred.gpus,
        )
        return replace(node, node_id=name, gpus=tuple(replace(g, model=_named(g.model)) for g in node.gpus))
    count = int(resources.get("GPU", 0))
    model = next((key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)), "")
    known = find_gpu(gpu_table(), model)
    size = known.usable_bytes if known else 0
    gpus = tuple(Gpu(f"{name}/gpu{i}", i, known.name if known else model, size) for i in range(count))
    return Node(name, gpus, cpu_milli, memory_bytes, closed)


def _named(driver_name: str) -> str:
    """The table's name for what the driver calls a GPU."""
    known = find_gpu(gpu_table(), driver_name)
    return known.name if known else driver_name
