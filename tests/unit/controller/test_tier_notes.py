"""What snapshots say about tiers that are drained, held, starting for the first time, or at zero."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.cluster.snapshot import TierMode, TierNote
from controlplane.core.domain.endpoint import EndpointState
from tests.support.controller import World


def note(world: World, tier: str = "small") -> TierNote | None:
    return world.registry.snapshot(secrets=False).note_of(tier)


def test_a_drained_tier_says_by_whom_since_when_and_why() -> None:
    world = World({"node-a": ["GPU-1"]}, {"small": 1}, shift_s=5000.0)
    world.settle()
    assert note(world) is None
    drained_unix_s = world.unix_s()
    world.controller.drain("small", "an upgrade")
    world.step(15)
    found = note(world)
    assert found is not None
    assert (found.mode, found.reason) == (TierMode.DRAINED, "drained by an operator: an upgrade")
    assert found.since_unix_s == drained_unix_s
    world.controller.uncordon("small")
    world.step(15)
    assert note(world) is None


def test_a_tier_at_zero_says_so() -> None:
    world = World({"node-a": ["GPU-1"]}, {"small": 1, "none": 0}, shift_s=5000.0)
    world.settle()
    found = note(world, "none")
    assert found is not None
    assert (found.mode, found.reason) == (TierMode.AT_ZERO, "set to 0 replicas")
    assert 5000.0 < found.since_unix_s <= world.unix_s()


def test_a_first_start_is_noted_until_it_serves() -> None:
    world = World({"node-a": ["GPU-1"]}, {"small": 1})
    world.step()
    for replica in world.replicas.values():
        replica.starts_in = 20
    world.step(15)
    found = note(world)
    assert found is not None
    assert found.mode is TierMode.STARTING
    world.step(15)
    assert note(world) is None


def test_a_failed_replica_leaves_once_others_serve_in_its_place() -> None:
    world = World({"node-a": ["GPU-1", "GPU-2"]}, {"small": 1})
    world.settle()
    [name] = world.replicas
    replica = world.replicas.pop(name)
    failed = replace(replica.endpoint, state=EndpointState.FAILED, diagnosis="out of memory")
    world.controller.report(failed)
    world.step(2)
    assert world.controller.endpoints[name].diagnosis == "out of memory"
    world.step(12)
    assert name not in world.controller.endpoints
    assert world.ready("small") == 1


def test_a_replica_whose_process_has_ended_releases_its_gpus_at_once() -> None:
    world = World({"node-a": ["GPU-1"]}, {"small": 1})
    world.settle()
    [name] = world.replicas
    unique = name.rpartition("-")[2]
    world.controller.observe_processes({unique})
    del world.replicas[name]
    world.controller.observe_processes({"another"})
    assert name not in world.controller.endpoints
    assert world.holder_of("GPU-1") == ()
