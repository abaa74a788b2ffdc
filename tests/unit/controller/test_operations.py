"""Operators' actions: the responses, and the effects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.core.domain.resource_name import ResourceKind, ResourceName, find_resource
from controlplane.core.gpus.health import GpuState
from controlplane.core.gpus.leases import GpuPart, LeaseOutcome
from controlplane.core.placement.gangs import GangShape
from controlplane.core.reconcile.commands import ActionOutcome
from controlplane.core.telemetry.samples import Absence, GpuCondition, Missing, NvLink
from controlplane.core.telemetry.series import Freshness
from tests.support.controller import World
from tests.support.samples import GIB, gpu_sample, node_sample


def world(replicas: int = 2, shape: GangShape | None = None) -> World:
    made = World(
        {name: [f"{name}-gpu{i}" for i in range(2)] for name in ("node-a", "node-b")},
        {"small": replicas},
        shape or GangShape(),
    )
    made.settle()
    return made


def state_of(made: World, uuid: str) -> GpuState:
    return GpuState(made.gpu(uuid).state)


def test_a_cordoned_gpu_keeps_its_replica_and_gets_no_other() -> None:
    made = world(replicas=1)
    controller = made.controller
    [name] = made.holder_of("node-a-gpu0")
    first = controller.cordon("node-a-gpu0", "a fan rattles")
    assert first.outcome is ActionOutcome.DONE
    assert name in first.reason
    again = controller.cordon("node-a-gpu0", "a fan rattles")
    assert again.outcome is ActionOutcome.UNCHANGED
    made.step(20)
    assert made.holder_of("node-a-gpu0") == (name,)
    assert state_of(made, "node-a-gpu0") is GpuState.CORDONED
    assert not made.migrations
    assert made.controller.gpus_out_of_use() == {"node-a-gpu0": "node-a"}
    assert controller.uncordon("node-a-gpu0").outcome is ActionOutcome.DONE
    assert controller.uncordon("node-a-gpu0").outcome is ActionOutcome.UNCHANGED
    assert made.controller.gpus_out_of_use() == {}


def test_a_drain_after_a_cordon_makes_the_replica_migrate() -> None:
    made = world(replicas=1)
    controller = made.controller
    controller.cordon("node-a-gpu0", "a fan rattles")
    assert controller.drain("node-a-gpu0", "a fan rattles").outcome is ActionOutcome.DONE
    assert controller.drain("node-a-gpu0", "a fan rattles").outcome is ActionOutcome.UNCHANGED
    made.step(15)
    assert made.holder_of("node-a-gpu0") == ()
    assert state_of(made, "node-a-gpu0") is GpuState.DRAINED
    assert made.ready("small") == 1


def test_a_node_is_drained_and_returns() -> None:
    made = world(replicas=2)
    controller = made.controller
    assert controller.drain("node-a", "a new kernel").outcome is ActionOutcome.DONE
    assert set(made.controller.gpus_out_of_use()) == {"node-a-gpu0", "node-a-gpu1"}
    refused = controller.uncordon("node-a-gpu0")
    assert refused.outcome is ActionOutcome.REFUSED
    assert "uncordon node-a" in refused.reason
    for _ in range(150):
        made.step()
        assert made.ready("small") >= 2
    assert made.holder_of("node-a-gpu0") == made.holder_of("node-a-gpu1") == ()
    assert controller.uncordon("node-a").outcome is ActionOutcome.DONE
    assert controller.uncordon("node-a").outcome is ActionOutcome.UNCHANGED
    assert made.controller.gpus_out_of_use() == {}


@pytest.mark.parametrize("condition", [GpuCondition.LOST, GpuCondition.RESET_REQUIRED])
def test_a_gpu_that_its_driver_can_not_use_can_not_be_uncordoned(condition: GpuCondition) -> None:
    made = world(replicas=1)
    controller = made.controller
    made.samples["node-a"] = {"node-a-gpu1": {"condition": condition, "detail": "fell off the bus"}}
    made.step(2)
    refused = controller.uncordon("node-a-gpu1")
    assert refused.outcome is ActionOutcome.REFUSED
    assert condition.value.replace("_", " ") in refused.reason
    assert made.gpu("node-a-gpu1").cordoned
    made.samples.clear()
    made.step()
    assert controller.uncordon("node-a-gpu1").outcome is ActionOutcome.DONE
    made.step(3)
    assert not made.gpu("node-a-gpu1").cordoned


def test_the_last_reading_of_a_silent_node_does_not_prevent_an_uncordon() -> None:
    made = world(replicas=1)
    made.samples["node-a"] = {"node-a-gpu1": {"condition": GpuCondition.LOST}}
    made.step(2)
    made.silent.add("node-a")
    made.step(10)
    assert made.controller.uncordon("node-a-gpu1").outcome is ActionOutcome.DONE


def test_a_tier_is_drained_until_it_is_uncordoned() -> None:
    made = world(replicas=2)
    controller = made.controller
    assert controller.drain("small", "costs too much").outcome is ActionOutcome.DONE
    assert controller.drain("small", "costs too much").outcome is ActionOutcome.UNCHANGED
    made.step(10)
    assert not made.replicas
    assert made.controller.targets()["small"].replicas == 0
    assert controller.restart("small", "").outcome is ActionOutcome.REFUSED
    start = made.controller.may_start("small")
    assert not start.allowed
    assert start.retry_after_s > 0
    waits = made.controller.lease_gpus("small-9", 1, "node-a", GangShape(), "small")
    assert waits.outcome is LeaseOutcome.WAIT
    assert controller.uncordon("small").outcome is ActionOutcome.DONE
    made.step(10)
    assert made.ready("small") == 2


def test_serve_fetches_the_target_of_a_drained_tier_before_its_replicas_retire() -> None:
    made = world(replicas=2)
    made.controller.drain("small", "costs too much")
    made.clock.s += 0.5
    made.controller.targets()
    made.controller.tick()
    assert not made.migrations, "Serve may not have gone by it"
    made.clock.s += 0.5
    made.controller.targets()
    made.controller.tick()
    assert {move.endpoint_id for move in made.migrations.values()} == set(made.replicas)


def test_a_tier_is_drained_while_serve_is_away() -> None:
    made = world(replicas=2)
    made.controller.drain("small", "costs too much")
    made.clock.s += 1.0
    made.controller.tick()
    assert not made.migrations
    made.clock.s += 5.0
    made.controller.tick()
    assert len(made.migrations) == 2


def test_a_drained_endpoint_is_replaced() -> None:
    made = world(replicas=1)
    controller = made.controller
    [name] = made.replicas
    assert controller.cordon(name, "").outcome is ActionOutcome.REFUSED
    assert controller.drain(name, "behaves oddly").outcome is ActionOutcome.DONE
    assert controller.drain(name, "behaves oddly").outcome is ActionOutcome.UNCHANGED
    for _ in range(15):
        made.step()
        assert made.ready("small") >= 1
    assert name not in made.replicas
    made.step(70)
    assert not made.controller.activity().drains
    assert made.ready("small") == 1


@pytest.mark.parametrize("subject", ["node-a", "node-a-gpu0"])
def test_restarting_a_gpu_or_a_node_restarts_what_runs_there(subject: str) -> None:
    made = world(replicas=3)
    controller = made.controller
    there = {
        name for name, lease in made.controller.leases.items() if subject in (lease.node_id, *lease.gpu_uuids)
    }
    answer = controller.restart(subject, "a new driver")
    assert set(answer.subjects) == there
    made.step(30)
    restarted = {name for name, item in made.registry.endpoints.items() if item.generation > 1}
    assert restarted == there
    assert controller.restart("node-b-gpu1", "").outcome is ActionOutcome.REFUSED


@pytest.mark.parametrize("action", ["cordon", "uncordon", "drain", "restart"])
def test_an_unknown_subject_is_reported_as_unknown(action: str) -> None:
    made = world()
    events = made.registry.events
    assert getattr(made.controller, action)("GPU-nowhere", "").outcome is ActionOutcome.UNKNOWN
    assert made.registry.events == events


def test_every_action_is_in_the_audit_log_with_who_and_why() -> None:
    made = world()
    made.controller.cordon("node-a-gpu0", "a fan rattles")
    event = made.registry.events[-1]
    assert (event.kind, event.subject, event.actor) == ("cordon", "node-a-gpu0", "operator")
    assert event.reason == "a fan rattles"


def test_names_may_be_shortened_if_they_stay_unique() -> None:
    there = {
        "gpus": {"GPU-1234-a", "GPU-1234-b", "GPU-9"},
        "nodes": {"3fa9c0de", "3fa9beef"},
        "tiers": {"small", "smaller"},
        "endpoints": {"small-x1y2"},
    }

    def find(name: str) -> ResourceName | str:
        return find_resource(name, **there)

    assert find("small") == ResourceName(ResourceKind.TIER, "small")
    assert find("smaller") == ResourceName(ResourceKind.TIER, "smaller")
    assert find("GPU-9") == ResourceName(ResourceKind.GPU, "GPU-9")
    assert find("3fa9c") == ResourceName(ResourceKind.NODE, "3fa9c0de")
    assert find("small-x") == ResourceName(ResourceKind.ENDPOINT, "small-x1y2")
    assert "matches 2 resources" in str(find("GPU-1234"))
    assert "no GPU, node, tier or endpoint" in str(find("3fa"))


# --- leases ------------------------------------------------------------------------------------------------


def test_a_lease_waits_for_the_nodes_first_report_and_for_a_new_controller() -> None:
    made = World({}, {"small": 1})
    controller = made.controller
    assert controller.lease_gpus("h", 1, "node-a", GangShape(), "small").outcome is LeaseOutcome.WAIT
    controller.observe_node("node-a", node_sample("node-a", 1, 0.0, [gpu_sample("g0")]), [])
    assert controller.lease_gpus("h", 1, "node-a", GangShape(), "small").outcome is LeaseOutcome.GRANTED
    made.start_controller("e2", settle_s=6.0)
    made.controller.observe_node("node-a", node_sample("node-a", 2, 0.0, [gpu_sample("g0")]), [])
    waits = made.controller.lease_gpus("other", 1, "node-a", GangShape(), "small")
    assert waits.outcome is LeaseOutcome.WAIT
    assert waits.retry_after_s > 0
    assert made.controller.restore_lease("h", 1, "node-a", (GpuPart("g0"),)).outcome is LeaseOutcome.GRANTED
    made.clock.s += 6.0
    refused = made.controller.lease_gpus("other", 1, "node-a", GangShape(), "small")
    assert refused.outcome is LeaseOutcome.REFUSED
    assert "needs 1 free GPU" in refused.reason


def test_a_node_whose_gpus_cannot_be_read_is_left_to_ray() -> None:
    made = World({"node-a": []}, {})
    made.observe()
    answer = made.controller.lease_gpus("h", 1, "node-a", GangShape(), "small")
    assert answer.outcome is LeaseOutcome.UNMANAGED
    assert "no driver" in answer.reason


def test_suspect_gpus_and_those_of_a_silent_driver_are_the_last_resort() -> None:
    made = World({"node-a": ["g0", "g1"]}, {})
    made.samples["node-a"] = {"g0": {"temperature_c": 95}}
    made.observe()
    first = made.controller.lease_gpus("h1", 1, "node-a", GangShape(), "t")
    second = made.controller.lease_gpus("h2", 1, "node-a", GangShape(), "t")
    assert first.lease is not None
    assert first.lease.gpu_uuids == ("g1",)
    assert second.lease is not None
    assert second.lease.gpu_uuids == ("g0",)


def test_gpus_of_one_island_go_together() -> None:
    made = World({}, {})
    links = {0: 2, 2: 0, 1: 3, 3: 1}
    gpus = []
    for i in range(4):
        sample = gpu_sample(f"g{i}", i)
        nvlinks = (NvLink(True, f"g{links[i]}", to_switch=False),)
        gpus.append(replace(sample, info=replace(sample.info, nvlinks=nvlinks)))
    made.controller.observe_node("n", node_sample("n", 1, 0.0, gpus), [])
    answer = made.controller.lease_gpus("h", 1, "n", GangShape(gpus=2), "t")
    assert answer.lease is not None
    assert answer.lease.gpu_uuids in (("g0", "g2"), ("g1", "g3"))


def test_a_lease_ends_with_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world(replicas=1)
    [name] = made.replicas
    [uuid] = made.replicas[name].endpoint.gpu_uuids
    replica = made.replicas.pop(name)
    monkeypatch.setattr(made, "start", lambda tier: None)
    made.step(8)
    assert made.holder_of(uuid) == (name,)
    made.step(5)
    assert made.holder_of(uuid) == ()
    answer = made.controller.report(replica.endpoint)
    assert not answer.known


def test_no_lease_ends_because_the_controller_stood_still() -> None:
    made = world(replicas=1)
    before = dict(made.controller.leases)
    made.clock.s += 300.0
    made.controller.tick()
    assert made.controller.leases.keys() == before.keys()


def test_a_replica_that_claims_another_ones_gpu_has_to_retire() -> None:
    made = world(replicas=1)
    [name] = made.replicas
    [uuid] = made.replicas[name].endpoint.gpu_uuids
    other = replace(made.replicas[name].endpoint, endpoint_id="small-old")
    made.controller.register(other)
    answer = made.controller.restore_lease("small-old", 1, other.node_id, (GpuPart(uuid),))
    assert answer.outcome is LeaseOutcome.REFUSED
    made.controller.tick()
    made.controller.tick()
    assert [command.kind for command in made.controller.report(other).commands] == ["retire"]
    assert made.holder_of(uuid) == (name,)


def test_shares_are_accounted_with_their_memory() -> None:
    made = world(replicas=3, shape=GangShape(milli_gpu=300, gpu_memory_bytes=30 * GIB))
    assert made.ready("small") == 3
    for view in made.controller.gpus():
        assert sum(holder.milli for holder in view.holders) <= 1000
        assert sum(holder.memory_bytes for holder in view.holders) <= 80 * GIB
    assert sum(len(view.holders) for view in made.controller.gpus()) == 3


# --- the inventory -----------------------------------------------------------------------------------------


def test_a_missing_reading_is_none_in_the_inventory() -> None:
    made = world(replicas=1)
    view = made.controller.gpus()[0]
    assert (view.uuid, view.node_id, view.state, view.condition) == (
        "node-a-gpu0",
        "node-a",
        "healthy",
        "ok",
    )
    assert view.freshness is Freshness.FRESH
    assert (view.temperature_c, view.memory_used_bytes) == (50, GIB)
    assert [holder.endpoint_id for holder in view.holders] == list(made.replicas)
    made.samples["node-a"] = {
        "node-a-gpu0": {
            "condition": GpuCondition.UNREADABLE,
            "temperature_c": Missing(Absence.NO_DRIVER, "gone"),
            "memory_used_bytes": Missing(Absence.NO_DRIVER, "gone"),
            "memory_free_bytes": Missing(Absence.NO_DRIVER, "gone"),
            "gpu_ratio": Missing(Absence.NO_DRIVER, "gone"),
            "power_w": Missing(Absence.NO_DRIVER, "gone"),
        }
    }
    made.step(10)
    stale = made.controller.gpus()[0]
    assert (stale.condition, stale.freshness) == ("unreadable", Freshness.STALE)
    made.step(40)
    gone = made.controller.gpus()[0]
    assert gone.freshness is Freshness.MISSING
    assert gone.temperature_c is gone.memory_used_bytes is gone.gpu_ratio is gone.power_w is None
    assert gone.state == "healthy"
