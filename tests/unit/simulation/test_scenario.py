"""Scenarios from configurations and clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.config import parse_plane
from controlplane.core.domain.request import RequestShape
from controlplane.core.placement.topology import Gpu, Node
from controlplane.errors import SetupError
from controlplane.models.catalog import gpu_named
from controlplane.planning.cluster_file import load_cluster
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.options import Options
from controlplane.simulation.outages import OutageModel
from controlplane.simulation.scenario import Scenario
from controlplane.simulation.scenario_builder import build_scenario
from tests.support.repository import CONFIGS

REQUEST = RequestShape(500.0, 100.0)
CLUSTERS = CONFIGS / "clusters"
SMALL: dict[str, Any] = {"name": "t", "model": "Qwen/Qwen2.5-1.5B-Instruct"}
LARGE = {**SMALL, "model": "Qwen/Qwen2.5-14B-Instruct"}


def node(name: str, gpus: int, model: str, **more: Any) -> Node:
    known = gpu_named(model).usable_bytes if model != "Homemade" else 1 << 40
    found = tuple(Gpu(f"{name}/{i}", i, model, known) for i in range(gpus))
    return Node(name, found, 64_000, 1 << 40, **more)


def scenario(tier: dict[str, Any], *nodes: Node, **settings: Any) -> Scenario:
    plane = parse_plane({"tiers": [tier], **settings})
    return build_scenario(plane, Options(), REQUEST, nodes)


def test_a_replica_has_the_speed_of_its_gpu_and_the_most_frequent_one_is_assumed() -> None:
    (tier,) = scenario(SMALL, node("a", 4, "L4"), node("b", 2, "H100-80G")).tiers
    slow, fast = (tier.replica.engines[name].timing.step_s(1, 500.0) for name in ("L4", "H100-80G"))
    assert slow > 3 * fast
    assert tier.replica.engine is tier.replica.engines["L4"]
    # The scaler assumes the roofline's speed; engines reach a share of it.
    assert tier.rule.prior.step_s + tier.rule.prior.step_s_per_sequence == pytest.approx(
        slow * Options().engine_ratio, rel=0.05
    )


def test_gpus_out_of_use_do_not_count() -> None:
    out = node("a", 4, "L4", unavailable="cordoned")
    (tier,) = scenario(SMALL, out, node("b", 2, "H100-80G")).tiers
    assert list(tier.replica.engines) == ["H100-80G"]


def test_gpu_models_of_the_tier_come_first() -> None:
    machines = node("a", 4, "L4"), node("b", 2, "H100-80G")
    (tier,) = scenario({**SMALL, "gpu_models": ["H100-80G", "L4"]}, *machines).tiers
    assert tier.replica.engine is tier.replica.engines["H100-80G"]
    (tier,) = scenario({**SMALL, "gpu_models": ["H100-80G"]}, *machines).tiers
    assert list(tier.replica.engines) == ["H100-80G"]


def test_a_model_goes_only_where_it_fits() -> None:
    (tier,) = scenario(LARGE, node("a", 4, "L4"), node("b", 2, "H100-80G")).tiers
    assert tier.replica.shape is not None
    assert tier.replica.shape.models == frozenset({"H100-80G"})
    assert list(tier.replica.engines) == ["H100-80G"]


def test_shape_priority_and_budget_come_from_the_configuration() -> None:
    tier = {**SMALL, "tensor_parallel_size": 2, "scaling": {"max_replicas": 3, "priority": 7}}
    made = scenario(tier, node("a", 4, "L4"), controller={"scaling": {"gpus": 3}})
    (only,) = made.tiers
    assert (made.gpus, only.rule.priority, only.rule.gpus_per_replica) == (3, 7, 2.0)
    assert only.replica.shape is not None
    assert only.replica.shape.gpus == 2
    assert only.rule.max_replicas == 3


def test_tiers_on_cpus_need_room_and_external_endpoints_do_not() -> None:
    plane = parse_plane(
        {
            "tiers": [
                {"name": "cpu", "engine": "simulated", "cpus": 2, "engine_args": {"itl_ms": 5}},
                {"name": "away", "engine": "endpoint", "url": "http://there:1", "model": "m"},
            ]
        }
    )
    cpu, away = build_scenario(plane, Options(), REQUEST, [node("a", 0, "L4")]).tiers
    assert cpu.replica.shape is not None
    assert (cpu.replica.shape.gpus, cpu.replica.shape.cpu_milli) == (0, 2000)
    assert cpu.replica.engine.timing == SimulatedTiming(0.0, 0.005)
    assert away.replica.shape is None
    # An external endpoint has no replicas to scale.
    assert (away.rule.min_replicas, away.rule.max_replicas) == (1, 1)


def test_node_failures_follow_the_options() -> None:
    plane = parse_plane({"tiers": [{"name": "t", "engine": "simulated"}]})
    options = replace(Options(), node_mtbf_hours=2.0, node_recovery_s=30.0)
    made = build_scenario(plane, options, REQUEST, load_cluster(CLUSTERS / "one-node.yaml").to_nodes())
    assert made.outages == OutageModel(7200.0, 30.0)
    assert made.nodes is not None
    assert [len(each.gpus) for each in made.nodes] == [4]


@pytest.mark.parametrize(
    ("tier", "machine", "words"),
    [
        (LARGE, node("a", 4, "L4"), "no such GPU on 1 node; `tierplane plan"),
        ({**LARGE, "tensor_parallel_size": 2}, node("a", 1, "L4"), "has no place on this cluster"),
        ({**SMALL, "gpu_models": ["H100-80G"]}, node("a", 4, "L4"), "has no place on this cluster"),
        (SMALL, node("a", 4, "Homemade"), "speed is not known: Homemade. Name others in its gpu_models"),
        (SMALL, node("a", 4, "L4", unavailable="cordoned"), "node unavailable on 1 node"),
    ],
)
def test_a_tier_that_does_not_fit_or_has_no_known_speed_is_named(
    tier: dict[str, object], machine: Node, words: str
) -> None:
    with pytest.raises(SetupError, match="tier 't'") as raised:
        scenario(tier, machine)
    assert words in str(raised.value)


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(SetupError, match="there is no node"):
        scenario(SMALL)
