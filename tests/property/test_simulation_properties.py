"""Properties of a simulated fleet, for any nodes, tiers and load."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.core.autoscaling.capacity import EngineSpeed
from controlplane.core.autoscaling.rule import ScalingRule
from controlplane.core.domain.request import RequestShape
from controlplane.core.domain.slo import Slo
from controlplane.core.placement.gangs import Gang, GangShape, Infeasible
from controlplane.core.placement.planner import PlacedCluster, Planner
from controlplane.core.placement.revalidation import revalidate
from controlplane.core.placement.topology import Gpu, Node
from controlplane.core.routing.tier_table import TierPolicy
from controlplane.simulation.clock import VirtualClock
from controlplane.simulation.cluster import Cluster
from controlplane.simulation.engine import SimulatedTiming
from controlplane.simulation.fleet import EngineModel, ReplicaModel
from controlplane.simulation.outages import OutageModel
from controlplane.simulation.policies import reactive_policy
from controlplane.simulation.scenario import Scenario, TierScenario
from controlplane.simulation.simulator import Simulator
from controlplane.simulation.trace_rows import Arrival

GIB = 1024**3
SHAPES = (
    GangShape(),
    GangShape(gpus=2),
    GangShape(gpus=4, gpu_memory_bytes=30 * GIB),
    GangShape(milli_gpu=300),
    GangShape(gpus=2, stages=2, across_nodes=True),
    GangShape(models=frozenset({"B"}), cpu_milli=2000),
    GangShape(gpus=0, cpu_milli=3000),
)


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Node, ...]:
    found = []
    for n in range(draw(st.integers(1, 3))):
        model, gib = draw(st.sampled_from([("A", 24), ("B", 80)]))
        broken = draw(st.sampled_from(["", "", "", "XID 79"]))
        gpus = tuple(
            Gpu(f"n{n}/{i}", i, model, gib * GIB, unavailable="" if i else broken)
            for i in range(draw(st.integers(0, 6)))
        )
        found.append(Node(f"n{n}", gpus, draw(st.sampled_from([4, 64])) * 1000, 512 * GIB))
    return tuple(found)


def gpus_of(machines: tuple[Node, ...]) -> int:
    return sum(not gpu.unavailable for node in machines for gpu in node.gpus)


def check_placements(cluster: Cluster, machines: tuple[Node, ...]) -> None:
    """No GPU, CPU or memory is used twice, and every replica is complete."""
    assert revalidate(cluster.placements, PlacedCluster(machines)) == ()
    held_milli = sum(placement.gang.shape.total_milli for placement in cluster.placements)
    assert held_milli <= 1000 * gpus_of(machines)


@given(nodes(), st.lists(st.sampled_from(SHAPES), max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_resources_are_used_once_and_waiting_replicas_do_not_fit(
    machines: tuple[Node, ...], first: list[GangShape], data: st.DataObject
) -> None:
    clock = VirtualClock()
    cluster = Cluster(clock, machines, SHAPES)
    replicas: dict[str, Gang] = {}
    placed: set[str] = set()
    lost: set[str] = set()

    def add(name: str, shape: GangShape) -> None:
        replicas[name] = Gang(name, shape, "tier")
        cluster.add(name, replicas[name], lambda _, __: placed.add(name))

    def remove(name: str) -> None:
        cluster.remove(name)
        replicas.pop(name)
        placed.discard(name)

    for number, shape in enumerate(first):
        add(f"first{number}", shape)
    assert not placed
    cluster.open()
    for step in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["add", "add", "add", "remove", "lose", "restore"])):
            case "add":
                add(f"r{step}", data.draw(st.sampled_from(SHAPES)))
            case "remove" if replicas:
                remove(data.draw(st.sampled_from(sorted(replicas))))
            case "lose":
                node_id = data.draw(st.sampled_from([node.node_id for node in machines]))
                if node_id not in lost:
                    lost.add(node_id)
                    for name in cluster.lose(node_id):
                        remove(name)
            case "restore" if lost:
                node_id = data.draw(st.sampled_from(sorted(lost)))
                lost.discard(node_id)
                cluster.restore(node_id)
        clock.run_until(float(step))
        usable = tuple(node for node in machines if node.node_id not in lost)
        check_placements(cluster, usable)
        assert {placement.gang.gang_id for placement in cluster.placements} == placed
        for name in set(replicas) - placed:
            planner = Planner(PlacedCluster(usable, cluster.placements))
            assert isinstance(planner.place(replicas[name]), Infeasible)
    assert cluster.most_gpus <= gpus_of(machines)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    tiers = []
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from(SHAPES[:4]))
        engine = EngineModel(SimulatedTiming(0.05, 0.02, 0.01), 1e6, 64)
        mtbf_s = draw(st.sampled_from([None, 200.0]))
        replica = ReplicaModel(
            engine, 4, gpus=shape.total_milli / 1000, cold_start_s=20.0, mtbf_s=mtbf_s, shape=shape
        )
        rule = ScalingRule(
            tier=f"t{number}",
            prior=EngineSpeed(0.02, 0.0002, 1e-6),
            mean_request=RequestShape(100.0, 50.0),
            gpus_per_replica=replica.gpus,
            priority=draw(st.integers(0, 2)),
            min_replicas=draw(st.integers(0, 1)),
            max_replicas=12,
            cold_start_s=20.0,
            sequences=4.0,
            slo=Slo(1.0, 0.1),
            hold_s=30.0,
        )
        tiers.append(
            TierScenario(TierPolicy(rule.tier, f"m{number}"), replica, rule, draw(st.integers(0, 3)))
        )
    return Scenario(
        tuple(tiers),
        "t0",
        deadline_s=60.0,
        nodes=draw(nodes()),
        outages=draw(st.sampled_from([None, OutageModel(100.0, 40.0)])),
        seed=draw(st.integers(0, 9)),
    )


@given(scenarios(), st.sampled_from(["tierplane", "hpa-slots", "kpa"]), st.data())
@settings(max_examples=60, deadline=None)
def test_no_resource_is_overcommitted_and_every_request_ends_once(
    scenario: Scenario, policy: str, data: st.DataObject
) -> None:
    rates = data.draw(st.lists(st.sampled_from([0.2, 4.0, 12.0]), min_size=3, max_size=3))
    arrivals = [
        Arrival(100.0 * part + number / rate, 50, 40, tier=f"t{number % len(scenario.tiers)}")
        for part, rate in enumerate(rates)
        for number in range(int(100 * rate))
    ]
    simulator = Simulator(scenario, reactive_policy(policy))
    machines = scenario.nodes or ()
    checked = []

    def check(_: object) -> None:
        check_placements(simulator.cluster, machines)
        held = {placement.gang.gang_id for placement in simulator.cluster.placements}
        assert held == {
            name
            for tier in simulator.tiers
            for name, replica in tier.fleet.replicas.items()
            if replica.placed_s is not None
        }
        checked.append(held)
        if simulator.clock.now_s < 300.0:
            simulator.clock.at(simulator.clock.now_s + 1.0, check)

    simulator.clock.at(0.5, check)
    result = simulator.run(arrivals)
    assert len(checked) > 290
    assert simulator.cluster.most_gpus <= gpus_of(machines)
    assert result.requests == len(arrivals)
    for tier in result.tiers:
        record = tier.record
        assert len(record.total_s) + record.refused + record.expired + record.lost == record.arrived
        assert 0 <= tier.placement.waiting <= tier.placement.waited
        assert tier.placement.longest_wait_s <= tier.placement.waited_s + 1e-9
