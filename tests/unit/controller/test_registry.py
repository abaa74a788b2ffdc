from dataclasses import replace

from controlplane.controller.registry import FAILED_KEPT_S, MISSED_REPORTS, WARMING_REPORTS, Registry
from controlplane.core.cluster.snapshot import GatewayInfo
from controlplane.core.cluster.tier_spec import TierSpec
from controlplane.core.domain.endpoint import Endpoint, EndpointState

HEARTBEAT_S = 2.0


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def make() -> tuple[Registry, Clock]:
    clock = Clock()
    return Registry(epoch="e1", heartbeat_s=HEARTBEAT_S, now_s=clock, unix_s=clock), clock


def endpoint(name: str = "balanced-1", state: EndpointState = EndpointState.STARTING) -> Endpoint:
    return Endpoint(
        endpoint_id=name,
        tier="balanced",
        model="m",
        engine="simulated",
        base_url="http://127.0.0.1:1",
        state=state,
        concurrency_limit=10,
        secret="s3cret",
        generation=1,
    )


def kinds(controller: Registry) -> list[str]:
    return [event.kind for event in controller.events]


def pass_time(controller: Registry, clock: Clock, s: float) -> None:
    """Time passes in steps of one heartbeat, as the actor's loop has it."""
    end_s = clock.s + s
    while clock.s < end_s:
        clock.s = min(end_s, clock.s + HEARTBEAT_S)
        controller.expire()


def test_an_unknown_endpoint_is_told_to_register() -> None:
    controller, _ = make()
    assert not controller.report(endpoint())
    assert controller.snapshot(secrets=True).endpoints == ()
    controller.register(endpoint())
    assert controller.report(endpoint())
    assert controller.snapshot(secrets=True).endpoints == (endpoint(),)


def test_the_version_grows_with_changes_only() -> None:
    controller, _ = make()
    controller.register(endpoint())
    version = controller.version
    controller.report(endpoint())
    controller.register(endpoint())
    assert controller.version == version
    controller.report(endpoint(state=EndpointState.READY))
    assert controller.version == version + 1


def test_gateway_load_is_no_change_but_coming_and_going_is() -> None:
    controller, _ = make()
    assert not controller.gateway_report(GatewayInfo("g1", "n1", "http://127.0.0.1:8080"))
    version = controller.version
    assert controller.gateway_report(GatewayInfo("g1", "n1", "http://127.0.0.1:8080", in_flight=7))
    assert controller.version == version
    assert controller.snapshot(secrets=False).gateways[0].in_flight == 7
    controller.gateway_gone("g1", "stopped")
    assert controller.version == version + 1
    assert controller.snapshot(secrets=False).gateways == ()


def test_an_illegal_or_old_report_is_refused_with_an_event() -> None:
    controller, _ = make()
    draining = replace(endpoint(state=EndpointState.DRAINING), generation=3)
    controller.register(draining)
    assert controller.report(replace(draining, state=EndpointState.READY))
    assert controller.report(replace(draining, generation=2))
    assert controller.snapshot(secrets=True).endpoints == (draining,)
    assert kinds(controller)[-2:] == ["refused", "refused"]


def test_secrets_are_in_what_gateways_pull_only() -> None:
    controller, _ = make()
    controller.register(endpoint())
    assert controller.snapshot(secrets=True).endpoints[0].secret == "s3cret"
    assert controller.snapshot(secrets=False).endpoints[0].secret == ""
    assert "s3cret" not in repr(controller.snapshot(secrets=True))
    assert "s3cret" not in repr(controller.events)


def test_missed_reports_drop_with_a_reason() -> None:
    controller, clock = make()
    controller.register(endpoint())
    controller.gateway_report(GatewayInfo("g1", "n1", ""))
    pass_time(controller, clock, MISSED_REPORTS * HEARTBEAT_S)
    assert controller.snapshot(secrets=True).endpoints
    pass_time(controller, clock, HEARTBEAT_S)
    assert controller.snapshot(secrets=True).endpoints == ()
    assert controller.snapshot(secrets=True).gateways == ()
    assert [(event.kind, event.reason) for event in controller.events if event.kind == "dropped"] == [
        ("dropped", "not heard of for 12.0 s")
    ]
    assert not controller.report(endpoint())


def test_reports_keep_an_endpoint() -> None:
    controller, clock = make()
    controller.register(endpoint())
    for _ in range(20):
        pass_time(controller, clock, 4 * HEARTBEAT_S)
        assert controller.report(endpoint())
    assert "dropped" not in kinds(controller)


def test_its_own_standstill_drops_nobody() -> None:
    controller, clock = make()
    controller.register(endpoint())
    clock.s += 60.0
    controller.expire()
    assert controller.snapshot(secrets=True).endpoints
    assert kinds(controller)[-1] == "stood still"
    pass_time(controller, clock, (MISSED_REPORTS + 1) * HEARTBEAT_S)
    assert controller.snapshot(secrets=True).endpoints == ()


def test_it_warms_for_a_few_reports_and_says_when_it_is_done() -> None:
    controller, clock = make()
    controller.deregister("balanced-7", "stopped")
    pass_time(controller, clock, 10 * WARMING_REPORTS * HEARTBEAT_S)
    first = controller.snapshot(secrets=True)
    assert first.warming, "nobody could reach it yet"
    assert first.gone == ("balanced-7",)
    controller.gateway_report(GatewayInfo("g1", "n1", ""))
    pass_time(controller, clock, (WARMING_REPORTS - 1) * HEARTBEAT_S)
    assert controller.snapshot(secrets=True).warming
    pass_time(controller, clock, HEARTBEAT_S)
    second = controller.snapshot(secrets=True)
    assert not second.warming
    assert second.gone == ()
    assert second.version > first.version
    controller.deregister("balanced-8", "stopped")
    assert controller.snapshot(secrets=True).gone == ()


def test_deregistering_says_why() -> None:
    controller, _ = make()
    controller.register(endpoint())
    controller.deregister("balanced-1", "replica stopped")
    assert controller.snapshot(secrets=True).endpoints == ()
    assert (kinds(controller)[-1], controller.events[-1].reason) == ("deregistered", "replica stopped")


def test_it_knows_for_how_long_it_has_been_empty() -> None:
    controller, clock = make()
    assert controller.empty_for_s() == 0.0
    clock.s += 3.0
    assert controller.empty_for_s() == 3.0
    controller.register(endpoint())
    assert controller.empty_for_s() == 0.0
    controller.deregister("balanced-1", "")
    controller.expire()
    clock.s += 4.0
    assert controller.empty_for_s() == 4.0


def test_the_last_declaration_holds() -> None:
    controller, _ = make()
    spec = TierSpec("balanced", "m", "simulated", 1, 10)
    controller.declare([spec], 1.0)
    controller.declare([replace(spec, replicas=2)], 1.0)
    assert controller.tiers == (replace(spec, replicas=2),)


def test_an_event_has_a_number_of_its_own() -> None:
    controller, _ = make()
    controller.register(endpoint())
    controller.deregister("balanced-1", "")
    assert [event.number for event in controller.events] == [1, 2, 3]


def test_a_failed_endpoint_is_shown_for_a_while_after_its_replica_is_gone() -> None:
    controller, clock = make()
    controller.register(replace(endpoint(state=EndpointState.FAILED), diagnosis="no such model"))
    pass_time(controller, clock, 2 * MISSED_REPORTS * HEARTBEAT_S)
    assert [item.diagnosis for item in controller.snapshot(secrets=False).endpoints] == ["no such model"]
    assert controller.empty_for_s() > 0
    pass_time(controller, clock, FAILED_KEPT_S)
    assert controller.snapshot(secrets=False).endpoints == ()


def test_what_runs_at_a_draining_endpoint_is_known_once_every_gateway_saw_it_draining() -> None:
    controller, _ = make()
    busy = GatewayInfo("g1", "n1", "", in_flight_by_endpoint=(("balanced-1", 2), ("balanced-2", 5)))
    idle = GatewayInfo("g2", "n1", "")
    controller.gateway_report(busy)
    controller.gateway_report(idle)
    controller.register(endpoint(state=EndpointState.READY))
    assert controller.still_running("balanced-1") is None
    controller.report(endpoint(state=EndpointState.DRAINING))
    seen = ("e1", controller.version)
    assert controller.still_running("balanced-1") is None
    controller.gateway_report(replace(busy, snapshot=seen))
    assert controller.still_running("balanced-1") is None
    controller.gateway_report(replace(idle, snapshot=("e0", 999)))
    assert controller.still_running("balanced-1") is None
    controller.gateway_report(replace(idle, snapshot=seen))
    assert controller.still_running("balanced-1") == 2
    controller.gateway_gone("g1", "stopped")
    assert controller.still_running("balanced-1") == 0
