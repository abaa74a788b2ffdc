"""What the controller does when a GPU, a node or an engine fails, second by second and without Ray."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.domain.endpoint import EndpointState
from controlplane.core.gpus.health import OUT_OF_USE, GpuState
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import ReplicaCommandKind
from controlplane.core.reconcile.migrations import MigrationPhase
from controlplane.core.telemetry.samples import (
    Absence,
    EngineSample,
    GpuCondition,
    GpuEvent,
    GpuEventKind,
    Missing,
)
from controlplane.errors import NotSettled
from tests.support.controller import HEARTBEAT_S, World, xid


def two_nodes(replicas: int = 1, gpus: int = 2, shift_s: float = 0.0) -> World:
    nodes = {name: [f"{name}-{i}" for i in range(gpus)] for name in ("n1", "n2")}
    world = World(nodes, {"small": replicas}, shift_s=shift_s)
    world.settle()
    assert world.ready("small") == replicas
    return world


def used(world: World) -> list[str]:
    return sorted(uuid for lease in world.controller.leases.values() for uuid in lease.gpu_uuids)


def state_of(world: World, uuid: str) -> GpuState:
    return GpuState(world.gpu(uuid).state)


def test_an_xid_makes_the_replica_migrate_and_never_fewer_serve() -> None:
    world = two_nodes(replicas=2)
    [sick, _] = used(world)
    [holder] = world.holder_of(sick)
    world.events.append(xid(sick[:2], sick, 79))
    for _ in range(30):
        world.step()
        assert world.ready("small") >= 2
    assert sick not in used(world)
    assert holder not in world.registry.endpoints
    assert world.ready("small") == 2
    assert state_of(world, sick) is GpuState.DRAINED
    wanted = ["starting elsewhere first", "retiring", "draining", "deregistered", "lease ended"]
    assert [kind for kind in world.kinds(holder) if kind in wanted] == wanted
    world.step(70)
    assert not world.migrations
    assert world.controller.targets()["small"].replicas == 2
    assert world.ready("small") == 2


def test_without_room_it_is_retired_and_comes_back_when_there_is_room() -> None:
    world = World({"n1": ["n1-0"]}, {"small": 1})
    world.settle()
    world.events.append(xid("n1", "n1-0", 79))
    world.step(10)
    assert world.ready("small") == 0
    assert used(world) == []
    move = next(event for event in world.registry.events if event.kind == "retiring")
    assert "no room elsewhere" in move.reason
    world.nodes["n2"] = ["n2-0"]
    world.step(10)
    assert used(world) == ["n2-0"]
    assert world.ready("small") == 1


def test_an_overheating_gpu_is_vacated_and_returns_after_it_was_cool_for_long_enough() -> None:
    world = two_nodes()
    [hot] = used(world)
    world.samples[hot[:2]] = {hot: {"temperature_c": 95}}
    world.step(2)
    assert state_of(world, hot) is GpuState.SUSPECT
    world.step(10)
    assert state_of(world, hot) in OUT_OF_USE
    world.step(15)
    assert used(world) != [hot]
    assert world.ready("small") == 1
    world.samples.clear()
    world.step(45)
    assert state_of(world, hot) in (GpuState.RETURNED, GpuState.HEALTHY)


def test_a_gpu_that_comes_and_goes_stays_away_longer_each_time() -> None:
    world = two_nodes()
    away = []
    for _ in range(3):
        world.samples["n1"] = {"n1-1": {"temperature_c": 95}}
        world.step(10)
        assert "n1-1" in world.controller.gpus_out_of_use()
        world.samples.clear()
        steps = 0
        while "n1-1" in world.controller.gpus_out_of_use():
            world.step()
            steps += 1
        away.append(steps)
    assert away[1] > 1.8 * away[0]
    assert away[2] > 1.8 * away[1]


def test_a_silent_agent_and_a_driver_that_is_gone_change_nothing() -> None:
    world = two_nodes(replicas=2)
    before = used(world)
    world.silent.add("n1")
    world.step(60)
    assert used(world) == before
    world.silent.clear()
    gone = {
        "condition": GpuCondition.UNREADABLE,
        "temperature_c": Missing(Absence.NO_DRIVER, "no driver"),
        "memory_free_bytes": Missing(Absence.NO_DRIVER, "no driver"),
    }
    world.samples["n1"] = dict.fromkeys(world.nodes["n1"], gone)
    world.events.append(GpuEvent("n1", "a", 1, 0.0, GpuEventKind.DRIVER_GONE, detail="unloaded"))
    world.step(60)
    assert used(world) == before
    assert not world.controller.gpus_out_of_use()
    assert not world.migrations
    assert world.controller.targets()["small"].replicas == 2


def test_replicas_of_a_lost_node_are_replaced_and_its_leases_end() -> None:
    world = two_nodes(replicas=2, gpus=2)
    assert used(world) == ["n1-0", "n1-1"]
    del world.nodes["n1"]
    world.step(10)
    assert used(world) == ["n2-0", "n2-1"]
    assert world.ready("small") == 2
    assert "node lost" in world.kinds("n1")


def test_a_replica_that_serves_nothing_is_retired_at_once() -> None:
    world = two_nodes()
    [replica] = world.replicas.values()
    [sick] = used(world)
    replica.endpoint = replace(replica.endpoint, state=EndpointState.RESTARTING)
    replica.starts_in = 1000
    world.events.append(xid(sick[:2], sick, 79))
    world.step(3)
    move = world.migrations[replica.endpoint.endpoint_id]
    assert move.phase is MigrationPhase.RETIRING
    assert "serves no requests" in move.note


def test_where_nothing_starts_elsewhere_the_old_one_is_retired_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = two_nodes()
    [sick] = used(world)
    world.events.append(xid(sick[:2], sick, 79))
    monkeypatch.setattr(world, "start", lambda tier: None)
    [name] = world.replicas
    world.step(30)
    assert world.migrations[name].phase is MigrationPhase.STARTING_ELSEWHERE
    world.step(40)
    assert name not in world.registry.endpoints


@pytest.mark.parametrize("same_cluster", [True, False])
def test_a_migration_goes_on_when_the_controller_is_killed_in_its_middle(same_cluster: bool) -> None:
    world = two_nodes(replicas=2, shift_s=5.0)
    [sick, _] = used(world)
    world.events.append(xid(sick[:2], sick, 79))
    world.step(2)
    [move] = world.migrations.values()
    assert move.phase is MigrationPhase.STARTING_ELSEWHERE
    migrations = world.migrations
    leases = {holder: lease.parts for holder, lease in world.controller.leases.items()}
    world.clock.s += 3
    world.restart_controller(same_cluster=same_cluster)
    if same_cluster:
        assert world.migrations == migrations
        assert {holder: lease.parts for holder, lease in world.controller.leases.items()} == leases
    for _ in range(40):
        world.step()
    assert sick not in used(world)
    assert world.ready("small") == 2
    world.step(70)
    assert not world.migrations
    assert len(world.replicas) == 2


def test_nothing_is_decided_before_a_gateway_has_declared_the_configuration() -> None:
    world = two_nodes(replicas=2)
    [sick, _] = used(world)
    world.events.append(xid(sick[:2], sick, 79))
    world.step(3)
    [newcomer] = [item for item in world.replicas.values() if item.endpoint.state is EndpointState.STARTING]
    newcomer.starts_in = 20
    world.restart_controller(same_cluster=True, declared=False)
    new = world.controller
    for _ in range(12):
        world.step()
        assert not new.activity().settled
        with pytest.raises(NotSettled):
            new.targets()
    assert not world.registry.warming
    assert newcomer in world.replicas.values(), "it is still wanted"
    world.declare()
    for _ in range(30):
        assert world.ready("small") >= 2
        world.step()
    assert sick not in used(world)
    assert newcomer.endpoint.state is EndpointState.READY
    assert world.started == 3


def test_a_target_stays_valid_until_a_killed_controller_can_be_back() -> None:
    world = two_nodes()
    left_s = {}
    for heartbeat_s in (HEARTBEAT_S, 10.0):
        world.controller.declare(world.registry.tiers, heartbeat_s)
        left_s[heartbeat_s] = world.controller.targets()["small"].valid_until_unix_s - world.clock.s
    assert left_s == {HEARTBEAT_S: 30.0, 10.0: 100.0}


def test_a_restart_of_a_tier_is_rolling() -> None:
    world = two_nodes(replicas=3)
    answer = world.controller.restart("small", "new weights")
    assert answer.outcome == "done"
    assert len(answer.subjects) == 3
    for _ in range(40):
        world.step()
        assert world.ready("small") >= 2
    assert {item.generation for item in world.registry.endpoints.values()} == {2}
    assert not world.controller.activity().restarts


def test_crashing_replicas_hold_their_tier_with_the_diagnosis() -> None:
    world = two_nodes()
    for _ in range(3):
        [name] = world.replicas
        replica = world.replicas[name]
        replica.endpoint = replace(
            replica.endpoint, state=EndpointState.FAILED, diagnosis="the flag --bad is not known"
        )
        world.report()
        world.end(name)
        world.step(2)
    assert "--bad" in world.controller.tier_holds["small"].reason
    assert not world.controller.may_start("small").allowed
    assert world.controller.targets()["small"].replicas <= 1
    born = world.started
    world.step(500)
    assert not world.replicas or all(
        replica.endpoint.state is EndpointState.READY for replica in world.replicas.values()
    )
    assert world.started - born < 600
    world.step(120)
    assert "released" in world.kinds("small")
    assert world.ready("small") == 1


def test_replicas_without_a_gpu_do_not_make_the_controller_hold_their_tier() -> None:
    world = two_nodes()
    [replica] = world.replicas.values()
    for number in range(5):
        failed = replace(
            replica.endpoint,
            endpoint_id=f"small-x{number}",
            state=EndpointState.FAILED,
            generation=0,
            diagnosis="no GPU for tier 'small' on this node",
        )
        world.controller.register(failed)
        world.step(2)
    assert not world.controller.tier_holds


def engine_sample(world: World, name: str, running: float, tokens: float) -> EngineSample:
    endpoint = world.replicas[name].endpoint
    return EngineSample(
        name,
        endpoint.generation,
        world.clock.s,
        0.01,
        gauges=(("running", running),),
        counters=(("generation_tokens_total", tokens), ("prompt_tokens_total", 10.0), ("success_total", 1.0)),
    )


def hang(world: World, name: str, seconds: int, running: float = 3.0, tokens_per_s: float = 0.0) -> None:
    """The metrics stay the same for a while, in every process of the engine."""
    for _ in range(seconds):
        world.step()
        if name in world.replicas:
            tokens = 100.0 + world.clock.s * tokens_per_s
            world.controller.observe_engine(engine_sample(world, name, running, tokens))


def test_a_stalled_engine_is_restarted_and_in_the_end_replaced() -> None:
    world = two_nodes()
    [name] = world.replicas
    hang(world, name, 110)
    assert world.replicas[name].endpoint.generation == 1
    hang(world, name, 30)
    assert world.replicas[name].endpoint.generation == 2
    event = next(event for event in world.registry.events if event.kind == "restart")
    assert "3 requests run but produce no tokens" in event.reason
    hang(world, name, 450)
    assert name not in world.replicas
    assert world.replicas


@pytest.mark.parametrize(("running", "tokens_per_s"), [(0.0, 0.0), (3.0, 5.0)])
def test_an_idle_or_productive_engine_is_not_restarted(running: float, tokens_per_s: float) -> None:
    world = two_nodes()
    [name] = world.replicas
    hang(world, name, 200, running, tokens_per_s)
    assert world.replicas[name].endpoint.generation == 1


def test_without_metrics_no_engine_counts_as_stalled() -> None:
    world = two_nodes()
    [name] = world.replicas
    hang(world, name, 60)
    world.step(300)
    assert world.replicas[name].endpoint.generation == 1
    for _ in range(200):
        world.step()
        gone = EngineSample(name, 1, world.clock.s, 0.01, error="connection refused")
        world.controller.observe_engine(gone)
    assert world.replicas[name].endpoint.generation == 1


def test_a_gang_gets_gpus_of_one_node_and_migrates_as_a_whole() -> None:
    world = World(
        {"n1": ["n1-0", "n1-1"], "n2": ["n2-0", "n2-1"], "n3": ["n3-0"]}, {"big": 1}, GangShape(gpus=2)
    )
    world.settle()
    assert used(world) == ["n1-0", "n1-1"]
    world.events.append(xid("n1", "n1-1", 48))
    world.step(20)
    assert used(world) == ["n2-0", "n2-1"]
    assert world.ready("big") == 1


def test_commands_are_repeated_until_they_are_carried_out() -> None:
    world = two_nodes()
    [name] = world.replicas
    replica = world.replicas[name]
    replica.obeys = False
    assert world.controller.restart(name, "").outcome == "done"
    assert world.controller.restart(name, "").outcome == "unchanged"
    world.controller.tick()
    for _ in range(3):
        [command] = world.controller.report(replica.endpoint).commands
        assert (command.kind, command.generation) == (ReplicaCommandKind.RESTART, 1)
    replica.obeys = True
    world.step(8)
    assert world.controller.report(replica.endpoint).commands == ()


def test_a_gpu_that_a_new_agent_does_not_see_is_lost() -> None:
    world = two_nodes(replicas=1)
    [uuid] = used(world)
    world.nodes["n1"].remove(uuid)
    world.step(3)
    assert uuid in world.controller.gpus_out_of_use()
    assert "no longer lists it" in world.gpu(uuid).reason
    world.step(15)
    assert used(world) != [uuid]
    assert world.ready("small") == 1


def test_a_node_that_was_never_listed_is_not_lost() -> None:
    world = two_nodes(replicas=2)
    before = used(world)
    [replica, _] = world.replicas.values()
    new = replace(replica.endpoint, endpoint_id="small-new", node_id="n9")
    world.controller.register(new)
    world.step()
    assert "small-new" in world.registry.endpoints
    assert used(world) == before


def test_operators_actions_survive_the_controller() -> None:
    world = two_nodes(replicas=2, shift_s=3.0)
    first, second = sorted(world.replicas)
    world.controller.drain(first, "behaves oddly")
    world.controller.restart(second, "new weights")
    world.controller.cordon("n2-1", "a fan rattles")
    world.restart_controller(same_cluster=True)
    world.step(30)
    assert first not in world.replicas
    assert world.replicas[second].endpoint.generation == 2
    assert world.controller.gpus_out_of_use() == {"n2-1": "n2"}
    assert world.ready("small") == 2


def test_a_migration_that_waited_does_not_use_gpus_that_were_cordoned_since() -> None:
    world = World({"n1": ["n1-0", "n1-1"], "n2": ["n2-0", "n2-1"]}, {"small": 2, "other": 0})
    world.settle()
    first, second = sorted(world.replicas)
    [node_id] = {replica.endpoint.node_id for replica in world.replicas.values()}
    other = "n1" if node_id == "n2" else "n2"
    world.controller.drain(node_id, "a fan rattles")
    controller = world.controller
    controller.tick()
    assert set(world.migrations) == {first}
    controller.tick()
    for uuid in world.nodes[other]:
        controller.cordon(uuid, "so is this one")
    del world.replicas[first]
    controller.deregister(first, "gone")
    assert {done.kind for done in controller.tick()} == {"GPU drained", "settling"}
    assert controller.tick() == (), "the GPUs that were found for it can no longer be used"
    assert second not in world.migrations
    [begun] = controller.tick()
    assert (begun.kind, begun.subject) == ("retiring", second)
    assert "no room elsewhere" in begun.reason
