"""The running cluster, from the data of Ray, the node agents and the controller."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray._private.state

from controlplane.config import PlaneConfig
from controlplane.controller.handle import ControllerHandle
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from controlplane.core.placement.occupancy import ReservedResources
from controlplane.core.telemetry.samples import NOT_SAMPLED, GpuCondition, GpuInfo, GpuSample, NodeSample
from controlplane.planning import live_cluster as module
from controlplane.planning.live_cluster import live_cluster
from controlplane.ray_cluster import plane
from tests.support.endpoints import make_endpoint

GIB = 2**30
CONFIG = {
    "tiers": [
        {"name": "small", "model": "m"},
        {"name": "wide", "model": "m", "pipeline_parallel_size": 2, "pipeline_across_nodes": True},
        {"name": "cloud", "engine": "endpoint", "url": "http://elsewhere", "model": "m"},
    ]
}


def endpoint(name: str, tier: str, state: EndpointState = EndpointState.READY, **more: Any) -> Endpoint:
    return make_endpoint(name, state, **{"tier": tier, "engine": "vllm", "node_id": "aaaaaaaaaa", **more})


def sample(gpus: int) -> NodeSample:
    nothing = NOT_SAMPLED
    return NodeSample(
        node_id="aaaaaaaaaa",
        epoch="e",
        seq=1,
        unix_s=0.0,
        boot_id="b",
        cpu_count=8,
        cpu_ratio=nothing,
        memory_total_bytes=64 * GIB,
        memory_available_bytes=50 * GIB,
        disk_free_bytes=nothing,
        driver_version=nothing,
        gpus=tuple(
            GpuSample(GpuInfo(uuid=f"GPU-{i}", index=i, name="NVIDIA L4"), GpuCondition.OK)
            for i in range(gpus)
        ),
    )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two nodes: one with an agent and four GPUs, one without an agent and with two."""
    seen = SimpleNamespace(endpoints=(), views=[], groups={})
    rows: list[dict[str, Any]] = [
        {"NodeID": "aaaaaaaaaa", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"NodeID": "bbbbbbbbbb", "Alive": True, "Resources": {"GPU": 2.0, "memory": 9.0 * GIB}},
        {"NodeID": "cccccccccc", "Alive": False, "Resources": {"GPU": 8.0}},
    ]
    rows[1]["Resources"]["accelerator_type:H100"] = 1.0
    rows = [{**row, "NodeManagerHostname": "host"} for row in rows]
    monkeypatch.setattr(ray, "nodes", lambda: rows)
    available = {"aaaaaaaaaa": {"CPU": 6.5, "GPU": 0.5}, "bbbbbbbbbb": {"GPU": 1.0}}
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: available)
    monkeypatch.setattr(module, "_sample", lambda node_id, _: sample(4) if node_id[0] == "a" else None)
    monkeypatch.setattr(module, "placement_group_table", lambda: seen.groups)
    actor = SimpleNamespace(gpus=SimpleNamespace(remote=lambda: seen.views))
    monkeypatch.setattr(module, "find_controller", lambda _: ControllerHandle(actor))
    monkeypatch.setattr(ray, "get", lambda ref, timeout: ref)

    def view(_: PlaneConfig) -> SimpleNamespace:
        return SimpleNamespace(snapshot=SimpleNamespace(endpoints=seen.endpoints))

    monkeypatch.setattr(plane, "view", view)
    return seen


def look() -> module.LiveCluster:
    return live_cluster(PlaneConfig.model_validate(CONFIG))


def test_nodes_and_reserved_resources(cluster: SimpleNamespace) -> None:
    found = look()
    one, two = found.nodes
    assert (one.node_id, two.node_id) == ("host-aaaaaaaa", "host-bbbbbbbb")
    assert [gpu.uuid for gpu in one.gpus] == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    assert (one.gpus[0].model, two.gpus[0].model) == ("L4", "H100-80G")
    assert (one.memory_bytes, two.memory_bytes) == (64 * GIB, 9 * GIB)
    assert found.reserved == {
        "host-aaaaaaaa": ReservedResources(3500, 1500, 14 * GIB),
        "host-bbbbbbbb": ReservedResources(1000, 0, 0),
    }
    assert found.notes == ()


def test_gpus_out_of_use_are_left_out_and_do_not_count_as_reserved(cluster: SimpleNamespace) -> None:
    def barred(uuid: str, node_id: str, *, node: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            uuid=uuid, node_id=node_id, cordoned=True, node_cordoned=node, state="cordoned", reason="XID 79"
        )

    cluster.views = [barred("GPU-2", "aaaaaaaaaa"), barred("x", "bbbbbbbbbb", node=True)]
    found = look()
    one, two = found.nodes
    assert [gpu.unavailable for gpu in one.gpus] == ["", "", "cordoned: XID 79", ""]
    assert two.unavailable == "XID 79"
    assert found.reserved is not None
    # For each GPU out of use the controller holds one that Ray counts.
    assert found.reserved["host-aaaaaaaa"].gpu_milli == 2500
    assert found.reserved["host-bbbbbbbb"].gpu_milli == 0


def test_replicas_with_gpus(cluster: SimpleNamespace) -> None:
    cluster.endpoints = (
        endpoint("small-a", "small", gpu_uuids=("GPU-1",)),
        endpoint("small-b", "small", EndpointState.DRAINING),
        endpoint("small-c", "small", EndpointState.FAILED),
        endpoint("cloud-d", "cloud", engine="endpoint"),
        endpoint("wide-e", "wide"),
    )
    bundle = {"GPU": 1.0}
    cluster.groups = {
        "gone": {
            "bundles": {0: bundle, 1: bundle},
            "bundles_to_node_id": {0: "aaaaaaaaaa", 1: "aaaaaaaaaa"},
            "state": "REMOVED",
        },
        "wide": {
            "bundles": {0: bundle, 1: bundle},
            "bundles_to_node_id": {0: "bbbbbbbbbb", 1: "aaaaaaaaaa"},
            "state": "CREATED",
        },
    }
    found = {replica.endpoint_id: replica for replica in look().replicas}
    assert list(found) == ["small-a", "small-b", "wide-e"]
    assert found["small-a"].gpu_uuids == ("GPU-1",)
    assert found["small-a"].node_id == "host-aaaaaaaa"
    assert found["small-b"].leaving
    assert found["wide-e"].gpus_by_node == (("host-aaaaaaaa", 1), ("host-bbbbbbbb", 1))


def test_a_note_says_that_the_plane_or_the_reservations_are_unknown(
    cluster: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_controller", lambda _: None)
    monkeypatch.setattr(plane, "view", lambda _: None)
    monkeypatch.delattr(ray._private.state, "available_resources_per_node")
    found = look()
    assert found.reserved is None
    assert len(found.notes) == 2
