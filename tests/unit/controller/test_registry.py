from dataclasses import replace

from controlplane.controller.registry import FAILED_SHOWN_S, MISSED_REPORTS, WARMING_REPORTS, Registry
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState
from tests.support.controller import Clock
from tests.support.endpoints import make_endpoint

HEARTBEAT_S = 2.0


def make() -> tuple[Registry, Clock]:
    clock = Clock(100.0)
    return Registry(epoch="e1", heartbeat_s=HEARTBEAT_S, now_s=clock, unix_s=clock), clock


def endpoint(name: str = "balanced-1", state: EndpointState = EndpointState.STARTING) -> Endpoint:
    return make_endpoint(name, state, secret="s3cret", generation=1)


def kinds(registry: Registry) -> list[str]:
    return [event.kind for event in registry.events]


def pass_time(registry: Registry, clock: Clock, s: float) -> None:
    """Time passes in steps of one heartbeat, as in the actor's loop."""
    end_s = clock.s + s
    while clock.s < end_s:
        clock.s = min(end_s, clock.s + HEARTBEAT_S)
        registry.expire()


def test_an_unknown_endpoint_has_to_register() -> None:
    registry, _ = make()
    assert not registry.report(endpoint())
    assert registry.snapshot(secrets=True).endpoints == ()
    registry.register(endpoint())
    assert registry.report(endpoint())
    assert registry.snapshot(secrets=True).endpoints == (endpoint(),)


def test_the_version_grows_with_changes_only() -> None:
    registry, _ = make()
    registry.register(endpoint())
    version = registry.version
    registry.report(endpoint())
    registry.register(endpoint())
    assert registry.version == version
    registry.report(endpoint(state=EndpointState.READY))
    assert registry.version == version + 1


def test_the_version_changes_when_a_gateway_comes_or_goes_but_not_with_its_load() -> None:
    registry, _ = make()
    assert not registry.gateway_report(GatewayInfo("g1", "n1", "http://127.0.0.1:8080"))
    version = registry.version
    assert registry.gateway_report(GatewayInfo("g1", "n1", "http://127.0.0.1:8080", in_flight=7))
    assert registry.version == version
    assert registry.snapshot(secrets=False).gateways[0].in_flight == 7
    registry.gateway_gone("g1", "stopped")
    assert registry.version == version + 1
    assert registry.snapshot(secrets=False).gateways == ()


def test_an_illegal_or_old_report_is_refused_with_an_event() -> None:
    registry, _ = make()
    draining = replace(endpoint(state=EndpointState.DRAINING), generation=3)
    registry.register(draining)
    assert registry.report(replace(draining, state=EndpointState.READY))
    assert registry.report(replace(draining, generation=2))
    assert registry.snapshot(secrets=True).endpoints == (draining,)
    assert kinds(registry)[-2:] == ["refused", "refused"]


def test_only_gateways_snapshots_have_secrets() -> None:
    registry, _ = make()
    registry.register(endpoint())
    assert registry.snapshot(secrets=True).endpoints[0].secret == "s3cret"
    assert registry.snapshot(secrets=False).endpoints[0].secret == ""
    assert "s3cret" not in repr(registry.snapshot(secrets=True))
    assert "s3cret" not in repr(registry.events)


def test_missed_reports_drop_with_a_reason() -> None:
    registry, clock = make()
    registry.register(endpoint())
    registry.gateway_report(GatewayInfo("g1", "n1", ""))
    pass_time(registry, clock, MISSED_REPORTS * HEARTBEAT_S)
    assert registry.snapshot(secrets=True).endpoints
    pass_time(registry, clock, HEARTBEAT_S)
    assert registry.snapshot(secrets=True).endpoints == ()
    assert registry.snapshot(secrets=True).gateways == ()
    assert [(event.kind, event.reason) for event in registry.events if event.kind == "dropped"] == [
        ("dropped", "no report for 12.0 s")
    ]
    assert not registry.report(endpoint())


def test_reports_keep_an_endpoint() -> None:
    registry, clock = make()
    registry.register(endpoint())
    for _ in range(20):
        pass_time(registry, clock, 4 * HEARTBEAT_S)
        assert registry.report(endpoint())
    assert "dropped" not in kinds(registry)


def test_the_controllers_own_standstill_drops_nothing() -> None:
    registry, clock = make()
    registry.register(endpoint())
    clock.s += 60.0
    registry.expire()
    assert registry.snapshot(secrets=True).endpoints
    assert kinds(registry)[-1] == "stood still"
    pass_time(registry, clock, (MISSED_REPORTS + 1) * HEARTBEAT_S)
    assert registry.snapshot(secrets=True).endpoints == ()


def test_it_is_warming_for_a_few_reports_and_its_snapshots_say_so() -> None:
    registry, clock = make()
    registry.deregister("balanced-7", "stopped")
    pass_time(registry, clock, 10 * WARMING_REPORTS * HEARTBEAT_S)
    first = registry.snapshot(secrets=True)
    assert first.warming, "no process could reach it yet"
    assert first.gone == ("balanced-7",)
    registry.gateway_report(GatewayInfo("g1", "n1", ""))
    pass_time(registry, clock, (WARMING_REPORTS - 1) * HEARTBEAT_S)
    assert registry.snapshot(secrets=True).warming
    pass_time(registry, clock, HEARTBEAT_S)
    second = registry.snapshot(secrets=True)
    assert not second.warming
    assert second.gone == ()
    assert second.version > first.version
    registry.deregister("balanced-8", "stopped")
    assert registry.snapshot(secrets=True).gone == ()


def test_deregistering_records_the_reason() -> None:
    registry, _ = make()
    registry.register(endpoint())
    registry.deregister("balanced-1", "replica stopped")
    assert registry.snapshot(secrets=True).endpoints == ()
    assert (kinds(registry)[-1], registry.events[-1].reason) == ("deregistered", "replica stopped")


def test_it_knows_for_how_long_it_has_been_empty() -> None:
    registry, clock = make()
    assert registry.empty_for_s() == 0.0
    clock.s += 3.0
    assert registry.empty_for_s() == 3.0
    registry.register(endpoint())
    assert registry.empty_for_s() == 0.0
    registry.deregister("balanced-1", "")
    registry.expire()
    clock.s += 4.0
    assert registry.empty_for_s() == 4.0


def test_the_last_declaration_holds() -> None:
    registry, _ = make()
    spec = TierSpec("balanced", "m", "simulated", 1, 10)
    registry.declare([spec], 1.0)
    registry.declare([replace(spec, replicas=2)], 1.0)
    assert registry.tiers == (replace(spec, replicas=2),)


def test_an_event_has_a_number_of_its_own() -> None:
    registry, _ = make()
    registry.register(endpoint())
    registry.deregister("balanced-1", "")
    assert [event.number for event in registry.events] == [1, 2, 3]


def test_a_failed_endpoint_is_shown_for_a_while_after_its_replica_is_gone() -> None:
    registry, clock = make()
    registry.register(replace(endpoint(state=EndpointState.FAILED), diagnosis="no such model"))
    pass_time(registry, clock, 2 * MISSED_REPORTS * HEARTBEAT_S)
    assert [item.diagnosis for item in registry.snapshot(secrets=False).endpoints] == ["no such model"]
    assert registry.empty_for_s() > 0
    pass_time(registry, clock, FAILED_SHOWN_S)
    assert registry.snapshot(secrets=False).endpoints == ()


def test_requests_at_a_draining_endpoint_are_known_once_every_gateway_has_seen_it_draining() -> None:
    registry, _ = make()
    busy = GatewayInfo("g1", "n1", "", in_flight_by_endpoint=(("balanced-1", 2), ("balanced-2", 5)))
    idle = GatewayInfo("g2", "n1", "")
    registry.gateway_report(busy)
    registry.gateway_report(idle)
    registry.register(endpoint(state=EndpointState.READY))
    assert registry.still_running("balanced-1") is None
    registry.report(endpoint(state=EndpointState.DRAINING))
    seen = ("e1", registry.version)
    assert registry.still_running("balanced-1") is None
    registry.gateway_report(replace(busy, snapshot=seen))
    assert registry.still_running("balanced-1") is None
    registry.gateway_report(replace(idle, snapshot=("e0", 999)))
    assert registry.still_running("balanced-1") is None
    registry.gateway_report(replace(idle, snapshot=seen))
    assert registry.still_running("balanced-1") == 2
    registry.gateway_gone("g1", "stopped")
    assert registry.still_running("balanced-1") == 0


def test_an_endpoint_whose_process_has_ended_leaves_at_once() -> None:
    """Only what Ray has listed before can be missed, and nothing is known without a list."""
    registry, _ = make()
    for name in ("balanced-1", "balanced-2", "balanced-new"):
        registry.register(endpoint(name, EndpointState.READY))
    registry.gateway_report(GatewayInfo("gateway-7", "n1", ""))
    registry.observe_processes({"1", "2", "7"})
    assert len(registry.endpoints) == 3
    registry.observe_processes({"2"})
    assert registry.endpoints.keys() == {"balanced-2", "balanced-new"}
    assert registry.gateways == {}
    assert kinds(registry)[-2:] == ["lost", "gateway gone"]
    registry.observe_processes({"2", "new"})
    registry.observe_processes({"2", "new"})
    assert registry.endpoints.keys() == {"balanced-2", "balanced-new"}


def test_a_failed_endpoint_keeps_its_diagnosis_until_it_was_replaced() -> None:
    registry, clock = make()
    registry.register(endpoint("balanced-1"))
    registry.observe_processes({"1"})
    registry.report(replace(endpoint("balanced-1", EndpointState.FAILED), diagnosis="no such model"))
    registry.observe_processes(set())
    pass_time(registry, clock, 60.0)
    assert registry.endpoints["balanced-1"].diagnosis == "no such model"
    registry.drop_replaced("other")
    assert "balanced-1" in registry.endpoints
    registry.drop_replaced("balanced")
    assert "balanced-1" not in registry.endpoints


def test_an_endpoint_that_misses_reports_is_shown_with_its_last_one() -> None:
    registry, clock = make()
    registry.register(endpoint("balanced-1"))
    registry.register(endpoint("balanced-2"))
    for _ in range(4):
        pass_time(registry, clock, HEARTBEAT_S)
        registry.report(endpoint("balanced-2"))
    assert registry.snapshot(secrets=False).silent == (("balanced-1", 100.0),)
    version = registry.version
    registry.report(endpoint("balanced-1"))
    registry.expire()
    assert registry.snapshot(secrets=False).silent == ()
    assert registry.version > version
